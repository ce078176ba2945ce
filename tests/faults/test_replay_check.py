"""A rank that computes wrong gradients: found by the replay check, named, replaced, and nothing of it is left."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.cluster import END_S, Cluster
from tests.faults.conftest import Drill, Run, events_of
from tests.faults.matrix import BASE, Cell

IN_PLACE = Ladder(5)
UNCHECKED = {"failure_domain": "rank"}
CHECKED = UNCHECKED | {"replay_check_every": 3, "history": 2, "history_every": 3}
TWO = replace(BASE, strategy_options=str(CHECKED))
THREE = replace(BASE, devices=3, samples=72, strategy_options=str(CHECKED | {"copies": 2}))

WRONG = {
    "in_the_middle": (THREE, "wrong:rank=1:step=5", 1),
    "after_the_first_check": (THREE, "wrong:rank=0:step=3", 0),
    "in_a_step_to_check": (THREE, "wrong:rank=2:step=7", 2),
    "accumulating": (replace(THREE, accumulate=2, samples=144), "wrong:rank=1:step=5", 1),
}


def consequences(report: DrillReport) -> list[Any]:
    events = events_of(report.faulted, "divergence")
    assert {event.fields["found_by"] for event in events} == {"replay_check"}
    return [event.fields["consequence"] for event in events]


@pytest.mark.parametrize(
    "name", [name if name == "in_the_middle" else pytest.param(name, marks=pytest.mark.long) for name in WRONG]
)
def test_a_rank_that_computes_wrongly_is_replaced_and_nothing_of_it_is_left(name: str, drill: Drill) -> None:
    options, fault, rank = WRONG[name]
    report = drill(Cell(fault, options), IN_PLACE)
    assert report.problems == () and report.identical
    events = events_of(report.faulted, "divergence")
    assert consequences(report) == ["go_back", "replace"]
    assert all(event.fields["wrong"] == [rank] and event.fields["ranks"] == [0, 1, 2] for event in events)
    [recovery] = report.recoveries
    assert recovery.culprit_rank == rank and (report.relaunches, report.in_place) == (0, 1)


@pytest.mark.long
def test_a_kill_between_checks_is_recovered_from_as_without_them(drill: Drill) -> None:
    report = drill(Cell("kill:rank=1:step=6:at=backward,kill:rank=0:step=10", TWO, recoveries=2), IN_PLACE)
    assert report.problems == () and report.identical
    assert len(report.recoveries) == 2 and events_of(report.faulted, "divergence") == []


CHECKS_NOTHING_CHANGES = {
    "plain": BASE,
    "accumulating": replace(BASE, accumulate=2, precision="bf16-mixed", clip=0.5, logger="both"),
    "workers": replace(BASE, workers=2, scheduler="plateau", early_stopping=True, checkpoint_every=3),
    "averaged": replace(BASE, ema=True, block="following:data"),
}


@pytest.mark.parametrize(
    "name", [name if name == "plain" else pytest.param(name, marks=pytest.mark.long) for name in CHECKS_NOTHING_CHANGES]
)
def test_a_run_with_checks_is_bit_identical_to_one_without(name: str, run: Run) -> None:
    options = CHECKS_NOTHING_CHANGES[name]
    plain = run(replace(options, strategy_options=str(UNCHECKED)), name="plain")
    checked = run(replace(options, strategy_options=str(CHECKED | {"replay_check_every": 2})), name="checked")
    assert (plain.exit_code, checked.exit_code) == (0, 0), checked.tail()
    verdict = compare(plain.folder, checked.folder)
    assert verdict.identical and verdict.points > 0, verdict.first


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "found", "words"),
    [
        ("heal", ["go_back", "end"], "so that going back does not help"),
        ("rewind", ["go_back", "end"], "so that going back does not help"),
        ("raise", ["end"], "(on_divergence='raise')"),
    ],
)
def test_two_ranks_are_both_named_and_the_run_ends(policy: str, found: list[str], words: str, run: Run) -> None:
    ended = run(replace(TWO, strategy_options=str(CHECKED | {"on_divergence": policy})), "wrong:rank=1:step=5")
    assert ended.exit_code != 0
    assert [event.fields["consequence"] for event in events_of(ended, "divergence")] == found
    output = "".join(path.read_text() for path in (ended.folder / "output").rglob("*") if path.is_file())
    assert "DivergenceError: rank 0: ranks 0, 1 compute different gradients from the same micro-batch" in output
    assert "which of them is wrong is unknown" in output and words in output


@pytest.mark.long
def test_ranks_that_have_never_agreed_end_the_run(run: Run) -> None:
    ended = run(THREE, "wrong:rank=2:step=1")
    assert ended.exit_code != 0
    assert [event.fields["consequence"] for event in events_of(ended, "divergence")] == ["end"]
    assert "by majority rank 2 is wrong (in the first check)" in ended.tail()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_micro_batches_are_handed_to_other_nodes(tmp_path: Path, stack: ExitStack) -> None:
    options = replace(BASE, devices=1, num_nodes=2, strategy_options=str(CHECKED | {"failure_domain": "node"}))
    cluster = Cluster(tmp_path, stack, options)
    cluster.arenas.mkdir()
    agents = [cluster.start_agent("wrong:rank=1:step=5") for _ in range(2)]
    assert all(agent.wait(timeout=END_S) for agent in agents), cluster.output()
    events = list(read_ledger(tmp_path / "runs" / "two-nodes" / "ledger.jsonl", only="divergence"))
    found = [(event.fields["found_by"], event.fields["ranks"], event.fields["consequence"]) for event in events]
    assert found == [("replay_check", [0, 1], "go_back"), ("replay_check", [0, 1], "end")], cluster.output()


@pytest.mark.long
def test_warn_names_the_ranks_and_trains_on(run: Run) -> None:
    options = replace(THREE, strategy_options=str(CHECKED | {"on_divergence": "warn", "history": 0}))
    ended = run(options, "wrong:rank=2:step=5")
    assert ended.exit_code == 0, ended.tail()
    events = events_of(ended, "divergence")
    assert [(event.fields["step"], event.fields["wrong"]) for event in events] == [(6, [2]), (9, [2])]


@pytest.mark.long
@pytest.mark.parametrize("option", [{}, {"replay_check_every": None}])
def test_without_checks_nobody_notices(option: dict[str, Any], run: Run) -> None:
    strategy_options = str((CHECKED if option else UNCHECKED) | option)
    ended = run(replace(TWO, strategy_options=strategy_options), "wrong:rank=1:step=5")
    assert ended.exit_code == 0 and events_of(ended, "divergence") == []
    assert len(events_of(ended, "fault_injected")) == 1


@pytest.mark.long
def test_a_step_that_exchanges_data_is_refused_in_the_first_step(run: Run) -> None:
    ended: Any = run(replace(TWO, block="exchanging"))
    assert ended.exit_code != 0
    assert "training_step exchanges data with other ranks (c10d." in ended.tail()
