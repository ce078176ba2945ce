"""Where time goes: whatever happens, the buckets sum to the wall time and nothing is counted twice."""

from __future__ import annotations

import json
from math import fsum

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_ckptless.protocol.time_account import WINDOW_S, Bucket, FitTime, Outage, TimeAccount, whole_run

instants = st.floats(0.0, 1e6)
buckets = st.sampled_from(Bucket)
outages = st.builds(
    Outage,
    **dict.fromkeys(
        (
            "agent_at", "process_at", "recovering_since", "fault_at", "detected_at", "stopped_at", "regrouped_at",
        ), st.none() | instants
    ),
    grows=st.booleans(),
)  # fmt: skip
fits = st.builds(FitTime, instants, instants, st.dictionaries(buckets, st.floats(0.0, 1e5), max_size=4), st.booleans())


def is_exact(account: TimeAccount) -> bool:
    """Whether the buckets sum to the wall time, without a negative one."""
    sums = fsum(account.seconds.values()) == pytest.approx(account.wall_s, rel=1e-9, abs=1e-6)
    return sums and all(spent_s >= 0 for spent_s in account.seconds.values())


@given(instants, st.lists(st.tuples(instants, buckets)))
def test_any_order_of_instants_sums_to_the_wall_time(began_at: float, marks: list[tuple[float, Bucket]]) -> None:
    account = TimeAccount(began_at)
    account.advance_through(marks)
    assert account.until == max([began_at, *(at for at, _ in marks)])
    assert is_exact(account)


@given(st.lists(st.tuples(instants, buckets)), instants, outages)
def test_an_outage_sums_to_the_time_since_the_restored_version(
    marks: list[tuple[float, Bucket]], restored_at: float, outage: Outage
) -> None:
    account = TimeAccount(0.0)
    account.advance_through(marks)
    before = TimeAccount.from_dict(json.loads(json.dumps(account.to_dict())))
    assert before == account
    account.advance_through(outage.marks(restored_at))
    assert account.until >= restored_at
    assert is_exact(account)
    assert account.productive_s == before.productive_s


@example([FitTime(0.0, 87.0, {Bucket.START: 4.8e-307})], [], 0.0, 87.0, False)
@given(st.lists(fits, max_size=5), st.lists(outages, max_size=5), instants, instants, st.booleans())
def test_any_ledger_sums_to_the_wall_time(
    reports: list[FitTime], faults: list[Outage], began_at: float, ended_at: float, is_over: bool
) -> None:
    account = whole_run(began_at, ended_at, reports, faults, is_over=is_over)
    assert account.until == max(began_at, ended_at)
    assert is_exact(account)


def test_a_recovery_costs_the_discarded_work_and_the_outage() -> None:
    account = TimeAccount(0.0)
    account.advance(2.0, Bucket.START)
    account.advance(10.0, Bucket.TRAINING)
    outage = Outage(fault_at=25.0, detected_at=26.0, stopped_at=28.0, regrouped_at=32.0)
    account.advance_through(outage.marks(restored_at=39.0))
    account.advance(50.0, Bucket.TRAINING)
    assert account.seconds == {
        Bucket.START: 2.0,
        Bucket.TRAINING: 19.0,
        Bucket.REPLAY: 15.0,
        Bucket.DETECT: 1.0,
        Bucket.ABORT: 2.0,
        Bucket.REGROUP: 4.0,
        Bucket.RESTORE: 7.0,
    }
    assert account.goodput == 19.0 / 50.0


@pytest.mark.parametrize(
    ("outage", "expected"),
    [
        # Another fault has cut the first attempt short.
        (Outage(recovering_since=12.0, fault_at=15.0, detected_at=16.0, stopped_at=17.0, regrouped_at=19.0),
         {"replay": 2, "regroup": 5, "detect": 1, "abort": 1, "restore": 1}),
        # Under torchrun, only the new process is known.
        (Outage(process_at=14.0, regrouped_at=19.0), {"detect": 4, "regroup": 5, "restore": 1}),
        # The agent was started again.
        (Outage(agent_at=16.0, regrouped_at=19.0), {"idle": 6, "regroup": 3, "restore": 1}),
        (Outage(fault_at=15.0, detected_at=16.0, grows=True),
         {"replay": 5, "elastic_transition": 5}),
    ],
)  # fmt: skip
def test_what_an_outage_is_split_into(outage: Outage, expected: dict[str, float]) -> None:
    account = TimeAccount(10.0)
    account.advance_through(outage.marks(restored_at=20.0))
    assert account.seconds == expected


def test_a_rewind_takes_back_the_steps_and_leaves_what_was_lost_meanwhile() -> None:
    account = TimeAccount(0.0)
    account.advance_through([(120.0, Bucket.TRAINING), (130.0, Bucket.DETECT), (200.0, Bucket.TRAINING)])
    account.rewind_to(100.0)
    account.advance(210.0, Bucket.REWIND)
    assert account.seconds == {Bucket.TRAINING: 100.0, Bucket.DETECT: 10.0, Bucket.REWIND: 100.0}
    assert is_exact(account) and account.recent_goodput == account.goodput
    account.rewind_to(100.0)
    assert account.productive_s == 100.0


@given(st.lists(st.tuples(instants, buckets)), st.floats(0.0, 1e6))
def test_a_rewind_keeps_the_sum(marks: list[tuple[float, Bucket]], productive_s: float) -> None:
    account = TimeAccount(0.0)
    account.advance_through(marks)
    before = account.productive_s
    account.rewind_to(productive_s)
    assert account.productive_s == min(before, productive_s)
    assert is_exact(account) and account.recent_goodput >= 0


def test_the_window_forgets_what_is_older_than_an_hour() -> None:
    account = TimeAccount(0.0)
    for minute in range(1, 121):
        account.advance(60.0 * minute, Bucket.TRAINING if minute > 60 else Bucket.START)
    assert (account.goodput, account.recent_goodput) == (0.5, 1.0)
    assert account.noted[0][0] >= account.until - WINDOW_S
    for minute in range(121, 136):
        account.advance(60.0 * minute, Bucket.DETECT)
    assert account.recent_goodput == 0.75


def test_a_run_younger_than_an_hour_has_one_goodput() -> None:
    account = TimeAccount(0.0)
    assert (account.goodput, account.recent_goodput) == (0.0, 0.0)
    for second in range(1, 600):
        account.advance(float(second), Bucket.TRAINING if second % 2 else Bucket.VALIDATION)
    assert account.recent_goodput == account.goodput == pytest.approx(0.5, abs=0.01)


TRAINED = FitTime(10.0, 20.0, {Bucket.START: 4.0, Bucket.TRAINING: 6.0})


@pytest.mark.parametrize(
    ("reports", "faults", "is_over", "expected"),
    [
        # No report yet.
        ([], [], False, {"start": 60}),
        # Training, stopped for good, returned.
        ([TRAINED], [], False, {"start": 14, "training": 46}),
        ([TRAINED], [], True, {"start": 14, "training": 6, "idle": 40}),
        ([FitTime(10.0, 20.0, TRAINED.seconds, is_over=True)], [], False, {"start": 14, "training": 6, "idle": 40}),
        # In a recovery, and after a last fault without one.
        ([TRAINED], [Outage(fault_at=25.0, detected_at=26.0, stopped_at=28.0)], False,
         {"start": 14, "training": 6, "replay": 5, "detect": 1, "abort": 2, "regroup": 32}),
        ([TRAINED], [Outage(fault_at=25.0, detected_at=26.0, stopped_at=28.0)], True,
         {"start": 14, "training": 6, "replay": 5, "detect": 1, "abort": 2, "idle": 32}),
        # A fault that the last report contains already.
        ([TRAINED], [Outage(fault_at=15.0, detected_at=16.0, stopped_at=18.0)], False, {"start": 14, "training": 46}),
        # A second fit, after one that has returned and after one whose state was lost.
        ([FitTime(10.0, 20.0, TRAINED.seconds, is_over=True), FitTime(30.0, 60.0, {Bucket.TRAINING: 30.0})], [], False,
         {"start": 14, "training": 36, "idle": 10}),
        ([TRAINED, FitTime(30.0, 60.0, {Bucket.TRAINING: 30.0})], [], False,
         {"start": 14, "replay": 6, "training": 30, "idle": 10}),
    ],
)  # fmt: skip
def test_what_a_ledger_leaves_out_goes_to_a_bucket_by_rule(
    reports: list[FitTime], faults: list[Outage], is_over: bool, expected: dict[str, float]
) -> None:
    account = whole_run(0.0, 60.0, reports, faults, is_over=is_over)
    assert account.seconds == pytest.approx(expected)
