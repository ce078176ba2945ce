"""The drill reports nondeterministic values, differences caused by faults, and runs that exceed their time limit."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_ckptless.cli.view.drill import ProgressView, short_cause, show_report
from lightning_ckptless.errors import TimeLimitError
from lightning_ckptless.formats.ledger_events import seal_line
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing import starters
from lightning_ckptless.testing.drill import DrillReport, Recovery, Variant, report_on, run_drill, run_variant
from lightning_ckptless.testing.drill_progress import Progress
from lightning_ckptless.testing.starters import LAUNCHERS, Launcher
from tests.testing.test_compare import batch, begin, end, write

TRACED = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["CKPTLESS_TRACE_DIR"])
folder.mkdir(parents=True)
rows = [
    {"kind": "batch", "fit": 0, "epoch": 0, "batch": 0, "step": 1, "generation": 1, "at": time.time(),
     "digests": {"parameter weight": "same"}, "values": {"samples_per_s": repr(time.perf_counter())}}
]
(folder / "trace-rank0.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
"""A script without torch whose trace has one value that never repeats."""

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def parent() -> Iterator[ForkServer]:
    with ForkServer() as preloaded:
        yield preloaded


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return [str(path)]


def shown(report: DrillReport) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115 - closed below
    show_report(report, console)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_exceeds_its_time_limit_is_stopped(
    launcher: Launcher, parent: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starters, "_END_GRACE_S", 1.0)
    seen: list[Progress] = []
    # A fixture checks after every test that no process is left.
    with pytest.raises(TimeLimitError, match="did not end within 4 s"):
        run_variant(
            script(tmp_path, DEAF),
            tmp_path / "run",
            nproc=1,
            launcher=launcher,
            parent=parent,
            timeout_s=4,
            progress=seen.append,
        )
    assert seen[-1].failed


def test_values_that_do_not_repeat_are_named(parent: ForkServer, tmp_path: Path) -> None:
    report = run_drill(
        script(tmp_path, TRACED), "kill:rank=0:step=9", folder=tmp_path / "drill", nproc=1, parent=parent
    )
    assert report.unrepeatable == ("samples_per_s",)
    text = shown(report)
    assert "two runs without faults also differ in samples_per_s" in text
    assert "NOT IDENTICAL" in text


def test_ignored_values_are_named_and_no_third_run_is_made(parent: ForkServer, tmp_path: Path) -> None:
    report = run_drill(
        script(tmp_path, TRACED),
        "kill:rank=0:step=9",
        folder=tmp_path / "drill",
        nproc=1,
        parent=parent,
        ignore=["samples_*", "misspelt"],
    )
    assert report.verdict.identical
    assert report.verdict.ignored == ("samples_per_s",)
    assert report.unused_patterns == ("misspelt",)
    assert not (tmp_path / "drill" / "repeated").exists()
    assert "--ignore misspelt: matches no value" in shown(report)


def finished(folder: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> Variant:
    write(folder / "trace", rows)
    ledger = folder / "runs" / "run" / "ledger.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(b"".join(seal_line(json.dumps(event).encode()) + b"\n" for event in events))
    return Variant(folder, 0, 1.0)


@pytest.mark.parametrize(("fault_at", "before"), [(1.5, False), (2.5, True)])
def test_differences_before_the_first_fault_are_found_by_time(fault_at: float, before: bool, tmp_path: Path) -> None:
    """Not by step: a second `fit` counts its steps from 0, and a late fault can lose rows of early steps."""
    other = [begin(), batch(1), batch(2, parameters="other"), batch(3), end(3)]
    fault = {"event": "fault_injected", "at": fault_at, "generation": 1, "rank": 0, "fault": "kill:rank=0:step=9"}
    report = report_on(
        ["train.py"],
        (),
        finished(tmp_path / "baseline", [begin(), batch(1), batch(2), batch(3), end(3)], []),
        finished(tmp_path / "faulted", other, [fault]),
    )
    assert report.differs_before_faults is before
    assert any("before the first fault" in problem for problem in report.problems) is before


@pytest.mark.parametrize(
    ("rank", "cause", "shown"),
    [
        (0, "died by SIGKILL", "rank 0: SIGKILL"),
        (1, "exited with code 3", "rank 1: exit 3"),
        (None, "the agent died", "the agent died"),
        (
            1,
            "rank 0 (pid 7) died by SIGKILL; then rank 1 (pid 8) exited with code 1",
            "rank 0: SIGKILL\nrank 1: exit 1",
        ),
    ],
)
def test_the_cause_of_a_recovery_is_short(rank: int | None, cause: str, shown: str) -> None:
    recovery = Recovery(2, "killed", rank, cause, "step 3", 1, {}, 0.5, "in place", {}, 0, 1.0)
    assert short_cause(recovery) == shown


@pytest.mark.parametrize(("failed", "mark"), [(False, "✓"), (True, "✗")])
def test_a_run_that_failed_is_marked(failed: bool, mark: str) -> None:
    console = Console(record=True, force_terminal=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    with ProgressView(console) as view:
        view.update(Progress("baseline", 3, 3, 0, 0, done=True, failed=failed))
    text = console.export_text()
    console.file.close()
    assert mark in text
