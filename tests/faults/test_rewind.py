"""Rewinds of real runs: compared with the run that was never rewound, or whose sampler never produced some batches."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.testing.compare import Comparison, compare
from lightning_ckptless.testing.drill import Variant
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill, Run, events_of
from tests.faults.matrix import BASE, Cell
from tests.lab.parts import Options

REWOUND = replace(BASE, strategy_options="{'history': 8}", logger="both")
SHARDED = replace(REWOUND, mesh="2x1")
DROPPING = replace(
    REWOUND,
    data="dropping",
    samples=96,
    settings="{'use_distributed_sampler': False}",
    val_interval=6,
    reload_every=1,
)
"""Two ranks, twelve batches per epoch and rank, validation after every six of them. The dataloaders are made again in
each epoch: otherwise Lightning takes the length of all epochs from the sampler of the first one."""


def without_abandoned(variant: Variant) -> None:
    """Remove the lines of abandoned branches from the traces, and keep the last attempt at each point.

    A rewind that a fault has cut short is not in the ledger, although it may be what the run continues from.
    """
    back = [(event.generation or 0, int(event.fields["version"].split()[1])) for event in events_of(variant, "rewind")]
    for path in variant.trace.glob("trace-rank*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if row["kind"] == "begin" or not _is_abandoned(row, back)]
        last = {_point(row): index for index, row in enumerate(kept)}
        kept = [row for index, row in enumerate(kept) if row["kind"] == "begin" or last[_point(row)] == index]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def _point(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("kind", "fit", "epoch", "step", "batch"))


def _is_abandoned(row: dict[str, Any], back: list[tuple[int, int]]) -> bool:
    return any(row["generation"] < generation and row["step"] > step for generation, step in back)


def against(reference: Variant, rewound: Variant) -> Comparison:
    assert rewound.exit_code == 0, rewound.tail()
    assert reference.exit_code == 0, reference.tail()
    without_abandoned(rewound)
    return compare(reference.folder, rewound.folder)


REPLAYED = {
    "ddp": (REWOUND, "rewind:step=8:to=3:rank=1", "step 3"),
    "ddp-accumulate": (replace(REWOUND, accumulate=2, samples=96), "rewind:step=5:to=2", "step 2"),
    "fsdp": (SHARDED, "rewind:step=8:to=3", "step 3"),
    "fsdp-accumulate": (replace(SHARDED, accumulate=2, samples=96), "rewind:step=5:to=2", "step 2"),
    "to_the_state_after_a_validation": (replace(REWOUND, val_interval=2), "rewind:step=8:to=4", "step 4"),
    "in_the_last_step": (REWOUND, "rewind:step=12:to=9", "step 9"),
    "mirror_every=3": (
        replace(REWOUND, samples=120, strategy_options="{'history': 8, 'mirror_every_n_steps': 3}"),
        "rewind:step=11:to=7",
        "step 6",
    ),
    "one_rank": (replace(REWOUND, devices=1, samples=24), "rewind:step=8:to=3", "step 3"),
    "on_late=skip": (
        replace(REWOUND, strategy_options="{'history': 8, 'on_late': 'skip'}", slow_mirror_s=0.02),
        "rewind:step=8:to=5",
        "",
    ),
    "checkpoints-plateau-early_stopping": (
        replace(REWOUND, scheduler="plateau", early_stopping=True, workers=2),
        "rewind:step=9:to=5",
        "step 5",
    ),
}
QUICK = ("ddp",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in REPLAYED]
)
def test_the_replay_is_bit_identical_to_the_first_pass(name: str, drill: Drill) -> None:
    options, fault, version = REPLAYED[name]
    report = drill(Cell(fault, options), Ladder(5))
    assert report.problems == ()
    assert report.identical
    [rewind] = events_of(report.faulted, "rewind")
    assert rewind.fields["version"] == version or not version
    assert rewind.fields["skipped_batches"] == 0
    assert rewind.fields["from_step"] > int(rewind.fields["version"].split()[1])
    assert (report.recoveries, report.relaunches, report.in_place) == ((), 0, 0)


SKIPPED = {
    "ddp": (DROPPING, "rewind:step=8:to=4:skip=3", "0:4:3"),
    "ddp-workers-accumulate": (
        replace(DROPPING, accumulate=2, workers=2, samples=192),
        "rewind:step=8:to=4:skip=5:rank=1",
        "0:8:5",
    ),
    "fsdp": (replace(DROPPING, mesh="2x1"), "rewind:step=8:to=4:skip=3", "0:4:3"),
    "fsdp-accumulate": (replace(DROPPING, mesh="2x1", accumulate=2, samples=192), "rewind:step=8:to=4:skip=4", "0:8:4"),
    "from_the_last_epoch": (DROPPING, "rewind:step=14:to=9:skip=1", "0:9:1"),
    "at_the_start_of_an_epoch": (DROPPING, "rewind:step=16:to=12:skip=3", "1:0:3"),
    "more_than_the_epoch_has": (DROPPING, "rewind:step=8:to=6:skip=100", "0:6:5"),
}
QUICK_SKIPS = ("ddp-workers-accumulate",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_SKIPS else pytest.param(name, marks=pytest.mark.long) for name in SKIPPED]
)
def test_after_skipping_the_run_is_one_whose_sampler_never_produced_these_batches(name: str, run: Run) -> None:
    options, fault, dropped = SKIPPED[name]
    rewound = run(options, fault)
    reference = run(replace(options, drop=dropped), name="reference")
    assert against(reference, rewound).differences == ()
    [rewind] = events_of(rewound, "rewind")
    assert rewind.fields["skipped_batches"] == int(dropped.split(":")[-1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("kill", "rewinds"),
    [
        # The versions of the old branch are still there: the rewind is decided again.
        ("kill:rank=1:step=8:at=rewind", 1),
        ("kill:rank=0:step=8:at=go_back", None),
        ("kill:rank=1:step=8:at=go_back", None),
    ],
)
def test_a_kill_during_a_rewind(kill: str, rewinds: int | None, run: Run) -> None:
    rewound = run(DROPPING, f"rewind:step=8:to=4:skip=3,{kill}")
    reference = run(replace(DROPPING, drop="0:4:3"), name="reference")
    assert against(reference, rewound).differences == ()
    assert len(events_of(rewound, "recovery")) == 1
    assert rewinds is None or len(events_of(rewound, "rewind")) == rewinds


def test_a_kill_after_a_rewind_does_not_lose_the_skip(run: Run) -> None:
    """The first step after the rewind is not committed yet, so the version that was gone back to is restored again."""
    rewound = run(DROPPING, "rewind:step=8:to=4:skip=3,kill:rank=1:step=9:at=backward,kill:rank=0:step=5:at=backward")
    reference = run(replace(DROPPING, drop="0:4:3"), name="reference")
    assert against(reference, rewound).differences == ()
    assert len(events_of(rewound, "rewind")) == 1


@pytest.mark.long
def test_a_rewind_from_another_terminal(run: Run, tmp_path: Path) -> None:
    options = replace(REWOUND, samples=400, epochs=1, slow_mirror_s=0.1)

    def ask() -> list[tuple[int, str]]:
        runs, answers = tmp_path / "run" / "runs", []
        wait_until(lambda: any('"committed"' in ledger.read_text() for ledger in runs.glob("*/ledger.jsonl")))
        [folder] = runs.glob("*")
        for flags in (["--steps", "1"], ["--steps", "1000"], ["--to-step", "1", "--skip-batches", "2"]):
            answer = CliRunner().invoke(app, ["rewind", str(folder), *flags])
            answers.append((answer.exit_code, answer.output))
        return answers

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        rewound = run(options)
        answers = asked.result(60)
    assert rewound.exit_code == 0, rewound.tail()
    assert [code for code, _ in answers][:2] == [0, 1], answers
    assert "requested from another terminal" in answers[0][1]
    assert "there is no step" in answers[1][1]
    rewinds = events_of(rewound, "rewind")
    assert "requested from another terminal" in rewinds[0].fields["reason"]
    assert [rewind.fields["skipped_batches"] for rewind in rewinds] == [0, 2][: len(rewinds)]


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    for _ in range(int(timeout_s / 0.05)):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"not within {timeout_s} s")


@pytest.mark.long
@pytest.mark.parametrize(
    ("faults", "options", "message"),
    [
        ("rewind:step=11:to=1", replace(REWOUND, strategy_options="{'history': 2}"), "the history has steps 8 to 11"),
        ("rewind:step=4:to=1", replace(REWOUND, strategy_options="{}"), "history=0: set history=1 or more"),
        ("rewind:step=4:to=1:skip=2", replace(REWOUND, data="iterable"), "the training data is an iterable"),
        ("rewind:step=9:to=7:times=4", REWOUND, "rewound 3 times in a row without getting beyond step 9"),
    ],
)
def test_a_rewind_that_is_not_possible_ends_the_run_with_the_reason(
    faults: str, options: Options, message: str, run: Run
) -> None:
    ended = run(options, faults)
    assert ended.exit_code != 0
    assert message in "".join(path.read_text() for path in (ended.folder / "output").rglob("*") if path.is_file())


def test_a_spike_on_one_rank_rewinds_all(run: Run) -> None:
    options = replace(DROPPING, callback="spiking")
    rewound = run(options)
    reference = run(replace(options, drop="0:6:2"), name="reference")
    assert against(reference, rewound).differences == ()
    [rewind] = events_of(rewound, "rewind")
    assert "on rank 1" in rewind.fields["reason"] and "the median of the 4 batches before" in rewind.fields["reason"]
    assert (rewind.fields["version"], rewind.fields["skipped_batches"]) == ("step 6", 2)
