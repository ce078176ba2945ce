"""What an agent reports about a fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.exit_report import (
    ExitReport,
    mark_begun,
    take_begun,
    take_exit_reports,
    write_exit_report,
)
from lightning_ckptless.membership.channel.fault_report import FaultReport, shell_code, split_exit


def report(rank: int | None = 1, exit_code: int | None = None, signal_name: str | None = "SIGKILL") -> FaultReport:
    return FaultReport(rank, 123, exit_code, signal_name, 10.0, 10.5, 11.0, 1, 2)


def test_a_report_survives_serialization() -> None:
    assert FaultReport.from_json(report().to_json()) == report()


@pytest.mark.parametrize(
    ("found", "kind", "text"),
    [
        (report(), "killed", "rank 1 (pid 123) died by SIGKILL"),
        (
            replace(report(), out_of_memory="the kernel has killed 2"),
            "killed",
            "rank 1 (pid 123) died by SIGKILL for lack of memory: the kernel has killed 2",
        ),
        (report(exit_code=3, signal_name=None), "exited", "rank 1 (pid 123) exited with code 3"),
        (report(rank=None, signal_name=None), "lost", "the members of the run changed"),
    ],
)
def test_a_report_says_what_happened(found: FaultReport, kind: str, text: str) -> None:
    assert (found.kind, str(found), found.fields()["kind"]) == (kind, text, kind)


@pytest.mark.parametrize(
    ("exit_code", "split", "shell"),
    [(0, (0, None), 0), (3, (3, None), 3), (-9, (None, "SIGKILL"), 137), (-64, (None, "SIGRTMAX"), 192)],
)
def test_exit_codes(exit_code: int, split: tuple[int | None, str | None], shell: int) -> None:
    assert (split_exit(exit_code), shell_code(exit_code)) == (split, shell)


def test_exit_reports_are_taken_once_in_the_order_of_ranks(tmp_path: Path) -> None:
    env = {environment.AGENT_DIR: str(tmp_path)}
    exit_reports = (ExitReport(0, True, "loss is nan"), ExitReport(3, False, ""))
    assert [write_exit_report(exit_report, env) for exit_report in reversed(exit_reports)] == [True, True]
    assert take_exit_reports(tmp_path) == exit_reports
    assert take_exit_reports(tmp_path) == ()


def test_progress_marks_are_taken_once(tmp_path: Path) -> None:
    mark_begun(1, {environment.AGENT_DIR: str(tmp_path)})
    mark_begun(1, {})
    assert [take_begun(tmp_path) for _ in range(2)] == [True, False]


def test_no_exit_report_is_written_without_an_agent_of_ours() -> None:
    assert write_exit_report(ExitReport(0, True, ""), {}) is False
