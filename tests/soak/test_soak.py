"""The soak test: what is drawn from a seed, what counts as lost, and what its tables show."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.fault_script import Fault, FaultKind, Moment, parse_faults
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.slot import Slot, SlotName
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.soak.draw import LATE, scenario
from tests.soak.judge import (
    BOUNDS_S,
    Evidence,
    Recovered,
    Result,
    bounds_s,
    deadline_s,
    judge,
    lost_steps,
    outcome_of,
    recoveries_of,
    too_late,
)
from tests.soak.outside import Commit, View, commits_of, flip_bytes, moment_of
from tests.soak.results import append, read, recovery_table, totals
from tests.soak.scenario import STEPS, Loss, OutsideFault, OutsideKind, Phase

SCENARIOS = [scenario(seed) for seed in range(1, 301)]
ONE_NODE = [drawn for drawn in SCENARIOS if drawn.configuration.loss is None]


def event(name: str, at: float, **fields: object) -> Event:
    return Event(name, at, 1, 0, dict(fields))


# ---------------------------------------------------------------------- drawing


def test_a_seed_always_gives_the_same_scenario() -> None:
    assert [scenario(seed) for seed in range(1, 301)] == SCENARIOS
    assert len({drawn.faults for drawn in SCENARIOS}) > 290


def test_every_kind_and_moment_and_phase_is_drawn() -> None:
    injected = [fault for drawn in SCENARIOS for fault in drawn.injected]
    outside = [fault for drawn in SCENARIOS for fault in drawn.outside]
    # Flipped bits of the training state and wrong products are injected by `benchmarks.audit`.
    assert {fault.kind for fault in injected} == set(FaultKind) - {FaultKind.REWIND, FaultKind.FLIP, FaultKind.WRONG}
    assert {fault.at for fault in injected} == set(Moment) - {Moment.REWIND, Moment.GO_BACK}
    assert {fault.kind for fault in outside} == set(OutsideKind)
    assert {fault.phase for fault in outside} == {None, *Phase}
    assert {drawn.configuration.loss for drawn in SCENARIOS} == {None, *Loss}
    assert {drawn.configuration.mesh for drawn in SCENARIOS} >= {"", "2x1", "4x1", "2x2"}
    assert any(drawn.configuration.elastic for drawn in SCENARIOS)


def test_what_is_drawn_can_happen() -> None:
    for drawn in SCENARIOS:
        configuration = drawn.configuration
        places = [(fault.rank, fault.step) for fault in drawn.injected]
        places += [(fault.rank, fault.step) for fault in drawn.outside]
        for rank, step in places:
            assert rank == "all" or 0 <= int(rank) < configuration.ranks
            assert 1 <= step <= STEPS
        assert parse_faults(",".join(map(str, drawn.injected))) == drawn.injected
        assert configuration.accumulate > 1 or all(fault.at is not Moment.ACCUMULATION for fault in drawn.injected)
        kinds = {fault.kind for fault in drawn.outside}
        assert configuration.durable or not kinds & {OutsideKind.SIDECAR, OutsideKind.DISK_FULL}
        assert configuration.copies or OutsideKind.FLIP not in kinds
        assert configuration.standbys or OutsideKind.STANDBY not in kinds


def test_no_two_exceptions_share_a_step() -> None:
    """The second would be taken for the script's own exception, which recurs."""
    for drawn in SCENARIOS:
        raised = [fault for fault in drawn.injected if fault.kind is FaultKind.RAISE]
        assert sum(fault.at in LATE for fault in raised) <= 1
        assert max(Counter(fault.step for fault in raised).values(), default=0) <= 1


def test_half_of_the_runs_are_loaded_and_most_have_many_faults() -> None:
    assert 0.4 < sum(drawn.load for drawn in SCENARIOS) / len(SCENARIOS) < 0.6
    assert sum(len(drawn.faults) for drawn in ONE_NODE) / len(ONE_NODE) > 10


def test_a_silent_fault_takes_longer_to_be_detected() -> None:
    drawn = replace(ONE_NODE[0], injected=(Fault(FaultKind.KILL, 0, 3),), outside=())
    hangs = replace(drawn, injected=(Fault(FaultKind.HANG, 0, 3),))
    assert deadline_s(hangs) > deadline_s(drawn)


# ---------------------------------------------------------------------- faults from outside


def test_a_fault_waits_for_its_step_or_for_the_phase_of_the_fault_that_it_follows() -> None:
    at_step = OutsideFault(OutsideKind.KILL, 1, 7, None, 0.02)
    in_phase = OutsideFault(OutsideKind.KILL, 1, 7, Phase.RESTORED, 0.25)
    view = View(events=[event("restored", 4.0)], committed=6)
    assert moment_of(at_step, view) is None
    view.take([event("fault_injected", 5.0, fault="kill:rank=0:step=7:at=mirror")])
    view.committed = 7
    assert moment_of(at_step, view) == 0.0
    assert moment_of(in_phase, view) is None, "a restore before the fault belongs to another recovery"
    view.take([event("restored", 5.5)])
    assert moment_of(in_phase, view) == pytest.approx(5.75)
    other = replace(in_phase, step=17)
    assert moment_of(other, view) is None


def test_the_view_knows_the_process_of_each_rank() -> None:
    view = View()
    view.take([event("workers_spawned", 1.0, pids={"0": 10, "1": 11})])
    view.take([event("in_place", 2.0, new={"1": [12, "standby"]})])
    assert view.pids == {0: 10, 1: 12}


def test_flipped_bytes_are_those_of_the_newest_committed_copy(tmp_path: Path) -> None:
    arena = tmp_path / "ckptless-run-node"
    arena.mkdir()
    paths = []
    for index in (0, 1):
        path = arena / str(SlotName.of(0, 0, "layout", index))
        slot = Slot(path, "run", 64)
        stamp = Stamp(Version(5 + index, True), 1, 1, "layout", 0, 0)
        slot.begin(stamp)
        slot.bulk[:] = torch.arange(64, dtype=torch.uint8)
        slot.seal(stamp, b"blob", "")
        slot.commit()
        slot.close()
        paths.append(path)
    before = [path.read_bytes() for path in paths]
    assert flip_bytes(tmp_path, 0, random.Random(1))
    older, newer = (
        [a != b for a, b in zip(path.read_bytes(), was, strict=True)] for path, was in zip(paths, before, strict=True)
    )
    assert not any(older)
    assert 1 <= sum(newer) <= 3
    assert not flip_bytes(tmp_path, 1, random.Random(1))


# ---------------------------------------------------------------------- evidence


def test_a_committed_step_that_is_replayed_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "commits"
    rows = [{"at": float(step), "step": step, "validation_done": True} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"at"')
    commits = commits_of(path)
    assert commits == [Commit(float(step), Version(step, True)) for step in (1, 2, 3)]
    assert lost_steps(commits, [event("restored", 3.5, version="step 3")]) == 0
    assert lost_steps(commits, [event("restored", 3.5, version="step 2 (before validation)")]) == 1
    assert lost_steps(commits, [event("restored", 2.5, version="step 2")]) == 0, "step 3 was committed later"


def test_a_durable_state_is_older_by_design() -> None:
    commits = [Commit(1.0, Version(9, True))]
    started = event("run_started", 2.0, reason="no replica is left; it resumes from the durable state of step 5")
    assert lost_steps(commits, [started, event("restored", 3.0, version="step 5")]) == 0


def test_a_relaunch_that_found_no_replica_is_a_kind_of_its_own() -> None:
    facts = {"kind": "killed", "cause": "died by SIGKILL", "total_s": 0.5}
    found = recoveries_of(
        [
            event("recovery", 2.0, rung="in place", **facts),
            event("run_started", 3.5, reason="it resumes from the durable state of step 5"),
            event("recovery", 4.0, rung="relaunch", **facts),
            event("recovery", 5.0, rung="relaunch", **facts),
        ]
    )
    assert [one.rung for one in found] == ["in place", "durable", "relaunch"]


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        ({}, "good"),
        ({"exit_code": None}, "hang"),
        ({"exit_code": 1}, "ended"),
        ({"identical": False}, "different"),
        ({"lost": 1}, "lost"),
        ({"leaks": ("a process",)}, "leak"),
    ],
)
def test_each_kind_of_failure_has_its_own_outcome(facts: dict[str, Any], outcome: str) -> None:
    found, why = outcome_of(replace(Evidence(0, identical=True), **facts))
    assert found == outcome
    assert bool(why) == (outcome != "good")
    assert outcome_of(Evidence(0, identical=True), ["killed: 30 s"]) == ("late", "too long: killed: 30 s")


def test_a_run_that_differs_is_judged_by_its_difference() -> None:
    drawn = ONE_NODE[0]
    assert judge(drawn, Evidence(0, identical=True)).good
    found = judge(drawn, Evidence(0, identical=False, difference="rank 1, step 3", why="slow", struck=("kill",)))
    assert (found.outcome, found.why, found.struck) == ("different", "rank 1, step 3", ("kill",))
    assert (
        judge(drawn, Evidence(None, identical=False, why="at step 7")).why == "the run missed its deadline; at step 7"
    )


def test_a_recovery_is_late_beyond_the_bound_of_its_rung() -> None:
    bound_s = BOUNDS_S["in place"]
    quick = Recovered("killed", "in place", bound_s - 1)
    assert too_late([quick, quick._replace(kind="hung", total_s=bound_s + 4)], BOUNDS_S, silent_s=5.0) == []
    assert len(too_late([quick._replace(total_s=bound_s + 4)], BOUNDS_S, silent_s=5.0)) == 1
    hung_first = quick._replace(cause="rank 1 (pid 7) hung: idle; then rank 0 (pid 8) died by SIGKILL")
    assert too_late([hung_first._replace(total_s=bound_s + 4)], BOUNDS_S, silent_s=5.0) == []


def test_a_rank_that_is_silent_during_recovery_gets_time_to_release_its_groups() -> None:
    quiet = replace(ONE_NODE[0], injected=(), outside=())
    stopped = replace(quiet, injected=parse_faults("stop:rank=0:step=4:at=regroup"))
    assert bounds_s(quiet) == BOUNDS_S
    assert bounds_s(stopped)["in place"] == BOUNDS_S["in place"] + 30


# ---------------------------------------------------------------------- results


def result(seed: int, **facts: object) -> Result:
    usual: dict[str, object] = {
        "seed": seed,
        "load": False,
        "struck": ("kill:rank=0:step=3:at=mirror",),
        "outcome": "good",
        "recoveries": (Recovered("killed", "in place", 0.5, "a kill"),),
    }
    return Result(**(usual | facts))  # type: ignore[arg-type]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert read(path) == []
    append(path, result(1, outcome="hang", why="late"))
    append(path, result(2))
    append(path, result(1))
    with path.open("a") as file:
        file.write('{"seed": 3')
    assert read(path) == [result(1), result(2)], "the last result of a seed counts, an unfinished line does not"


def test_the_tables_count_injected_faults_and_name_failures() -> None:
    results = [result(1), result(2), result(7, outcome="different", lost_steps=2)]
    table = totals(results)
    rows = {row[0]: row[1] for row in table.rows}
    assert (rows["faults injected"], rows["committed steps lost"], rows["runs not identical"]) == ("3", "2", "1")
    assert table.notes == ["Seeds 1 to 2, 7.", "Seed 7: different."]
    assert recovery_table(results).rows == [("killed", "in place", "3", "0.50", "0.50", "0.50")]
