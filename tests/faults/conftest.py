"""One fork server for all runs, and one undisturbed run per configuration for all drills of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_ckptless.ledger import LEDGER_NAME, Event
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import make_parent
from lightning_ckptless.testing.drill import DrillReport, Ladder, Variant, run_drill, run_variant
from lightning_ckptless.testing.starters import program_of
from tests.faults.matrix import Cell
from tests.faults.whole_time import require_whole_time
from tests.lab.parts import Options

LAB = Path(__file__).parents[1] / "lab" / "train.py"
REPOSITORY = Path(__file__).parents[2]


def command_for(options: Options) -> list[str]:
    """The lab's script with the options that are not its defaults."""
    words = [str(LAB)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            flag = "--" + field.name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return words


@pytest.fixture(scope="session")
def parent() -> Iterator[ForkServer]:
    """The fork server of all runs, so that imports are paid for once."""
    with make_parent(LaunchConfig(program=program_of([str(LAB)]))) as preloaded:
        preloaded.ready()
        yield preloaded


@pytest.fixture(autouse=True)
def _whole_time(tmp_path: Path) -> Iterator[None]:
    """Check the time of every run that a test has made in its folder."""
    yield
    for ledger in tmp_path.rglob(LEDGER_NAME):
        require_whole_time(ledger)


Run = Callable[..., Variant]


@pytest.fixture
def run(parent: ForkServer, tmp_path: Path) -> Run:
    """Return a function that runs the lab once."""

    def of(options: Options, faults: str = "", name: str = "run") -> Variant:
        return run_variant(
            command_for(options),
            tmp_path / name,
            faults=faults,
            nproc=options.devices,
            parent=parent,
            isolate=True,
            env={"PYTHONPATH": str(REPOSITORY)},
            ladder=Ladder(5),
            timeout_s=120,
        )

    return of


def events_of(variant: Variant, kind: str) -> list[Event]:
    """The events of one kind in the ledger of a run."""
    return [event for event in variant.events if event.event == kind]


Drill = Callable[[Cell, Ladder], DrillReport]


@pytest.fixture(scope="module")
def drill(parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """Return a function that runs a cell and compares it with the undisturbed run of its configuration."""
    baselines: dict[Options, Variant] = {}
    env = {"PYTHONPATH": str(REPOSITORY)}

    def run(cell: Cell, ladder: Ladder) -> DrillReport:
        options = cell.options
        if options not in baselines:
            folder = tmp_path_factory.mktemp("baseline") / "run"
            baselines[options] = run_variant(
                command_for(options), folder, nproc=options.devices, parent=parent, isolate=True, env=env
            )
            assert baselines[options].exit_code == 0, baselines[options].tail()
        report = run_drill(
            command_for(options),
            cell.faults,
            folder=tmp_path_factory.mktemp("drill"),
            nproc=options.devices,
            parent=parent,
            baseline=baselines[options],
            isolate=True,
            env=env,
            ladder=ladder,
            timeout_s=120,
        )
        for variant in (report.baseline, report.faulted):
            assert variant.run_folder is not None
            require_whole_time(variant.run_folder / LEDGER_NAME)
        return report

    return run
