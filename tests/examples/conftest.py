"""One fork server and one uninterrupted run per example, shared by the drills on it."""

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
    """ForkFallback the workers of all drills that are held in this process."""
    with shared_parent("ckptless", DIGITS) as preloaded:
        yield preloaded


@pytest.fixture(scope="package")
def baselines() -> dict[tuple[str, ...], Variant]:
    """The uninterrupted runs, by their commands. One serves all launchers: they too must make no difference."""
    return {}


@pytest.fixture
def drill(
    parent: ForkServer, baselines: dict[tuple[str, ...], Variant], tmp_path_factory: pytest.TempPathFactory
) -> Drill:
    """Holds a drill in which each run has a working directory of its own."""

    def hold(command: tuple[str, ...], faults: str, launcher: Launcher = "ckptless") -> DrillReport:
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

    return hold
