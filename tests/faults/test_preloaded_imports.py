"""The fork server learns the imports of the script, so that a replacement finds them loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import DrillReport, run_drill
from tests.faults.conftest import REPOSITORY

SCRIPT = REPOSITORY / "tests" / "lab" / "importing.py"
# A package that is slow to import; it records the processes that execute it.
NOTE = """
import os
with open(f"{__name__}.imports", "a") as notes:
    notes.write(f"{os.getpid()}\\n")
"""
THREAD = """
import threading
threading.Thread(target=threading.Event().wait, name="pump", daemon=True).start()
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with installed packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "careful.py").write_text(NOTE)
    (folder / "careless.py").write_text(NOTE + THREAD)
    (folder / "needs_careless.py").write_text(f"{NOTE}import careless\n")
    return folder


def kill(site: Path, how: str, parent: ForkServer) -> DrillReport:
    """Kill rank 1; with `learns`, only after the agent has recorded the outcome of the imports."""
    report = run_drill(
        [str(SCRIPT), str(site), how],
        "kill:rank=1:step=5",
        folder=site.parent / "drill",
        parent=parent,
        isolate=True,
        env={"PYTHONPATH": str(REPOSITORY)},
        timeout_s=120,
    )
    assert report.identical, report.problems
    assert (report.in_place, report.relaunches) == (1, 0)
    return report


def imports_of_replacements(report: DrillReport) -> list[tuple[str, bool]]:
    """For each replacement: the state of preloading when it started, and whether it had to import modules itself."""
    (arrivals,) = (event.fields["replacements"] for event in report.faulted.events if event.event == "recovery")
    return [(arrival["imports"], arrival["modules"] > 0) for arrival in arrivals]


def importers(report: DrillReport, package: str) -> list[str]:
    """Return which processes imported a package in the run with faults, in order."""
    events = report.faulted.events
    (first,) = (event.fields["pids"] for event in events if event.event == "workers_spawned")
    (new,) = (event.fields["new"] for event in events if event.event == "in_place")
    known = dict.fromkeys(first.values(), "worker") | {pid: "replacement" for pid, _ in new.values()}
    notes = report.faulted.folder / "cwd" / f"{package}.imports"
    return [known.get(int(line), "fork server") for line in notes.read_text().split()]


def test_imports_of_the_script_are_preloaded_for_replacements(site: Path, parent: ForkServer) -> None:
    report = kill(site, "learns", parent)
    (learned,) = (event.fields for event in report.faulted.events if event.event == "imports_learned")
    assert learned["left_out"] == {"careless": "starts a thread: pump", "needs_careless": "imports careless"}
    # Each attempt runs in a disposable process. The first detects the thread, the second the dependent package.
    attempts = ["fork server"] * learned["tries"]
    assert len(attempts) == 3
    assert importers(report, "careful") == ["worker", "worker", *attempts]
    assert importers(report, "careless") == ["worker", "worker", *attempts[:1], "replacement"]
    assert importers(report, "needs_careless") == ["worker", "worker", *attempts[:2], "replacement"]
    assert imports_of_replacements(report) == [("ready", True)]


def test_nothing_is_preloaded_if_preloading_is_off(site: Path, parent: ForkServer) -> None:
    report = kill(site, "does-not-learn", parent)
    assert not [event for event in report.faulted.events if event.event.startswith("imports_")]
    assert importers(report, "careful") == ["worker", "worker", "replacement"]
    assert imports_of_replacements(report) == [("off", True)]
