"""One fork server and one undisturbed run per example, shared by the drills on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import DrillReport, Variant, run_drill, run_variant
from lightning_ckptless.testing.starters import Launcher, shared_parent

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES.parent / "configs"

DIGITS = (str(EXAMPLES / "digits" / "train.py"), "--epochs", "2")
CHAR_GPT = (
    str(EXAMPLES / "char_gpt" / "train.py"),
    *("--steps", "16", "--layers", "1", "--width", "32", "--context", "32", "--batch-size", "4"),
)

Drill = Callable[..., DrillReport]


@pytest.fixture(scope="package")
def parent() -> Iterator[ForkServer | None]:
    """Return the fork server of all drills that run in this process."""
    with shared_parent("ckptless", DIGITS) as preloaded:
        yield preloaded


@pytest.fixture(scope="package")
def baselines() -> dict[tuple[str, ...], Variant]:
    """Return the undisturbed runs, by command; shared by all launchers, which must not change the results."""
    return {}


@pytest.fixture
def drill(
    parent: ForkServer, baselines: dict[tuple[str, ...], Variant], tmp_path_factory: pytest.TempPathFactory
) -> Drill:
    """Return a function that runs a drill in which each run has its own working directory."""

    def run(command: tuple[str, ...], faults: str, launcher: Launcher = "ckptless") -> DrillReport:
        report = run_drill(
            command,
            faults,
            folder=tmp_path_factory.mktemp("drill"),
            launcher=launcher,
            parent=parent,
            baseline=baselines.get(command)
            or run_variant(command, tmp_path_factory.mktemp("baseline"), parent=parent, isolate=True, timeout_s=200),
            isolate=True,
            timeout_s=200,
        )
        baselines[command] = report.baseline
        return report

    return run
