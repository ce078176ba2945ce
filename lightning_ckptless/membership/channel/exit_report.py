"""What a worker leaves for its agent in a folder: that it has trained, or that another relaunch would not help.

The same folder holds how a worker's script has failed, as its interpreter reported it (`program_failure.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_ckptless import environment


@dataclass(frozen=True, slots=True)
class ExitReport:
    """What a worker reports to its agent before it exits.

    Args:
        rank: rank of the worker.
        final: whether the run must end with this worker's exit code, however many relaunches are left.
        reason: why, in a sentence.
        unfit: whether this node cannot continue, rather than the run.
        keeps_state: whether the state allows a manual restart once the cause is fixed.
    """

    rank: int
    final: bool
    reason: str
    unfit: bool = False
    keeps_state: bool = False


def write_exit_report(exit_report: ExitReport, env: Mapping[str, str] = os.environ) -> bool:
    """Write an exit report for the agent of this worker.

    Returns:
        False if there is no agent of this package to read exit reports.
    """
    folder = env.get(environment.AGENT_DIR)
    if not folder:
        return False
    path = _path(folder, exit_report.rank)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(asdict(exit_report)))
    draft.rename(path)
    return True


def withdraw_exit_report(rank: int, env: Mapping[str, str] = os.environ) -> None:
    """Withdraw this worker's exit report: its script caught the exception and trains again."""
    if folder := env.get(environment.AGENT_DIR):
        _path(folder, rank).unlink(missing_ok=True)


def _path(folder: str, rank: int) -> Path:
    return Path(folder, f"exit_report-{rank}.json")


def take_exit_reports(folder: Path) -> tuple[ExitReport, ...]:
    """Read and remove the exit reports in a folder, in the order of ranks."""
    exit_reports = []
    for path in folder.glob("exit_report-*.json"):
        exit_reports.append(ExitReport(**{"rank": -1, "reason": "", **json.loads(path.read_text())}))
        path.unlink()
    return tuple(sorted(exit_reports, key=lambda exit_report: exit_report.rank))


def final_report(exit_reports: tuple[ExitReport, ...]) -> ExitReport | None:
    """Return the first report that ends the run; None if none does."""
    return next((exit_report for exit_report in exit_reports if exit_report.final), None)


def mark_begun(rank: int, env: Mapping[str, str] = os.environ) -> None:
    """Tell the agent of this worker that its generation has committed a step."""
    if folder := env.get(environment.AGENT_DIR):
        Path(folder, f"begun-{rank}").touch()


def take_begun(folder: Path) -> bool:
    """Whether the workers have committed a step since the last call."""
    marks = list(folder.glob("begun-*"))
    for mark in marks:
        mark.unlink()
    return bool(marks)
