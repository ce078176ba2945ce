"""Bits that flip in one rank's memory: found at the next version, the rank named, and healed bit-identically."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill, Run, events_of
from tests.faults.matrix import BASE, Cell, is_version
from tests.lab.parts import Options

IN_PLACE = Ladder(5)
VERIFYING = {"failure_domain": "rank"}
TWO = replace(BASE, strategy_options=str(VERIFYING))
THREE = replace(BASE, devices=3, samples=72, strategy_options=str(VERIFYING | {"copies": 2}))
PARAMETER = "parameter/head.weight"
MOMENT = "optimizer/0/head.weight/exp_avg"

FLIPS = {
    "parameter": (THREE, f"flip:rank=1:step=7:tensor={PARAMETER}:element=5:bit=30", 7),
    "first_moment": (THREE, f"flip:rank=2:step=4:tensor={MOMENT}:element=40:bit=22", 4),
    "lowest_bit": (THREE, f"flip:rank=0:step=9:tensor={MOMENT}:element=3:bit=0", 9),
    "two_ranks": (TWO, f"flip:rank=1:step=3:tensor={PARAMETER}:bit=12", 3),
    "during_the_copy": (THREE, f"flip:rank=1:step=5:tensor={PARAMETER}:bit=9:at=backward", 5),
    "first_step": (TWO, f"flip:rank=0:step=1:tensor={PARAMETER}:bit=20", 1),
    "last_step": (THREE, f"flip:rank=1:step=12:tensor={PARAMETER}:bit=20", 12),
    "mirror_every=3": (
        replace(TWO, strategy_options=str(VERIFYING | {"mirror_every_n_steps": 3})),
        f"flip:rank=1:step=7:tensor={PARAMETER}:bit=20",
        9,
    ),
    "rewind": (
        replace(TWO, strategy_options=str(VERIFYING | {"on_divergence": "rewind"})),
        f"flip:rank=0:step=6:tensor={PARAMETER}:bit=20",
        6,
    ),
}
QUICK = ("parameter",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FLIPS]
)
def test_a_flipped_bit_is_found_at_the_next_version_and_healed(name: str, drill: Drill) -> None:
    options, fault, step = FLIPS[name]
    report = drill(Cell(fault, options), IN_PLACE)
    assert report.problems == () and report.identical
    found = _only_divergence(report, options, fault)
    assert found["step"] == step and found["consequence"] == "go_back"
    [rewind] = events_of(report.faulted, "rewind")
    assert int(rewind.fields["version"].split()[1]) < step
    assert (report.recoveries, report.relaunches) == ((), 0)


def _only_divergence(report: DrillReport, options: Options, fault: str) -> dict[str, Any]:
    [event] = events_of(report.faulted, "divergence")
    rank = int(fault.split(":")[1].removeprefix("rank="))
    tensor = fault.split(":")[3].removeprefix("tensor=")
    assert event.fields["wrong"] == ([rank] if options.devices > 2 else [])
    assert [name.partition("[")[0] for name in event.fields["tensors"]] == [tensor]
    return event.fields


def of_policy(policy: str) -> Options:
    return replace(TWO, strategy_options=str(VERIFYING | {"on_divergence": policy}))


FLIP = f"flip:rank=1:step=4:tensor={PARAMETER}:element=2:bit=20"


@pytest.mark.long
def test_a_rank_that_is_wrong_again_is_replaced(drill: Drill) -> None:
    report = drill(Cell(f"{FLIP}:times=2", THREE), IN_PLACE)
    assert report.problems == () and report.identical
    found = [event.fields["consequence"] for event in events_of(report.faulted, "divergence")]
    assert found == ["go_back", "replace"]
    [recovery] = report.recoveries
    assert recovery.culprit_rank == 1 and (report.relaunches, report.in_place) == (0, 1)


@pytest.mark.long
def test_raise_ends_the_run_and_names_tensor_and_ranks(run: Run) -> None:
    ended = run(of_policy("raise"), FLIP)
    assert ended.exit_code != 0
    output = "".join(path.read_text() for path in (ended.folder / "output").rglob("*") if path.is_file())
    assert f"DivergenceError: rank 0: {PARAMETER}[" in output and "differ between ranks 0, 1" in output
    assert events_of(ended, "rewind") == []


@pytest.mark.long
def test_warn_trains_on_and_protects_what_is_there(run: Run) -> None:
    ended = run(of_policy("warn"), f"{FLIP},kill:rank=0:step=9")
    assert ended.exit_code == 0, ended.tail()
    [event] = events_of(ended, "divergence")
    assert event.fields["consequence"] == "send" and events_of(ended, "rewind") == []
    [recovery] = events_of(ended, "recovery")
    assert is_version(recovery.fields["version"], "step 8")


@pytest.mark.long
def test_ranks_that_never_agree_are_sent_what_they_hold(run: Run) -> None:
    ended = run(TWO, f"flip:rank=1:step=1:tensor={PARAMETER}:bit=20:times=3,kill:rank=1:step=9")
    assert ended.exit_code == 0, ended.tail()
    found = [event.fields["consequence"] for event in events_of(ended, "divergence")]
    assert found == ["go_back", "go_back", "send"]
    [recovery] = events_of(ended, "recovery")
    assert is_version(recovery.fields["version"], "step 8")


@pytest.mark.long
@pytest.mark.parametrize("option", [{"replicas": "send"}, {"checksum": "none"}])
def test_replicas_that_are_sent_are_not_compared(option: dict[str, str], run: Run) -> None:
    ended = run(replace(TWO, strategy_options=str(VERIFYING | option)), FLIP)
    assert ended.exit_code == 0, ended.tail()
    assert events_of(ended, "divergence") == []


@pytest.mark.long
def test_a_tensor_that_does_not_exist_is_refused_before_training(run: Run) -> None:
    ended = run(TWO, "flip:rank=1:step=4:tensor=parameter/head.wieght")
    assert ended.exit_code != 0 and "the closest are parameter/head.weight" in ended.tail()
