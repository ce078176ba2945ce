"""A rank that is lost when its script's imports have been learned: the new process finds them imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import DrillReport, run_drill
from tests.faults.conftest import REPOSITORY

SCRIPT = REPOSITORY / "tests" / "lab" / "importing.py"
# Stands for a package whose import takes long: it notes which processes run it.
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
    """A folder of installed packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "careful.py").write_text(NOTE)
    (folder / "careless.py").write_text(NOTE + THREAD)
    (folder / "needs_careless.py").write_text(f"{NOTE}import careless\n")
    return folder


def kill(site: Path, how: str, parent: ForkServer) -> DrillReport:
    """Kill rank 1 when the agent has said what has become of the imports, if it does."""
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


def imports_of_newcomers(report: DrillReport) -> list[tuple[str, bool]]:
    """How far the agent was when it started each newcomer, and whether that has imported anything by itself."""
    (arrivals,) = (event.fields["newcomers"] for event in report.faulted.events if event.event == "recovery")
    return [(arrival["imports"], arrival["modules"] > 0) for arrival in arrivals]


def importers(report: DrillReport, package: str) -> list[str]:
    """Who has imported a package in the run with faults, in order."""
    events = report.faulted.events
    (first,) = (event.fields["pids"] for event in events if event.event == "workers_spawned")
    (new,) = (event.fields["new"] for event in events if event.event == "in_place")
    known = dict.fromkeys(first.values(), "worker") | {pid: "newcomer" for pid, _ in new.values()}
    notes = report.faulted.folder / "cwd" / f"{package}.imports"
    return [known.get(int(line), "parent") for line in notes.read_text().split()]


def test_what_the_script_imports_is_imported_once_for_new_processes(site: Path, parent: ForkServer) -> None:
    report = kill(site, "learns", parent)
    (learned,) = (event.fields for event in report.faulted.events if event.event == "imports_learned")
    assert learned["left_out"] == {"careless": "starts a thread: pump", "needs_careless": "imports careless"}
    # In a process that was thrown away: the first learned of the thread, the second of what depends on it.
    tries = ["parent"] * learned["tries"]
    assert len(tries) == 3
    assert importers(report, "careful") == ["worker", "worker", *tries]
    assert importers(report, "careless") == ["worker", "worker", *tries[:1], "newcomer"]
    assert importers(report, "needs_careless") == ["worker", "worker", *tries[:2], "newcomer"]
    assert imports_of_newcomers(report) == [("ready", True)]


def test_nothing_is_imported_for_them_where_that_is_switched_off(site: Path, parent: ForkServer) -> None:
    report = kill(site, "does-not-learn", parent)
    assert not [event for event in report.faulted.events if event.event.startswith("imports_")]
    assert importers(report, "careful") == ["worker", "worker", "newcomer"]
    assert imports_of_newcomers(report) == [("off", True)]
