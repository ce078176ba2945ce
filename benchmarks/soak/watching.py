"""Follow a run: the ledger's events, and the versions that ranks have seen committed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.tail import Tail


@dataclass
class View:
    """What is known of a run at a moment.

    Args:
        events: events of the ledger so far.
        committed: newest optimizer step that a rank has seen committed.
        pids: process ids of the workers, by rank.
        standbys: process ids of the standbys.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    committed: int = -1
    pids: dict[int, int] = field(default_factory=dict)
    standbys: tuple[int, ...] = ()

    def take(self, events: list[dict[str, Any]], commits: list[dict[str, Any]]) -> None:
        """Add new events and commits."""
        self.events += events
        for event in events:
            if event["event"] == "workers_spawned":
                self.pids |= {int(rank): pid for rank, pid in event["pids"].items()}
            elif event["event"] == "in_place":
                self.pids |= {int(rank): pid for rank, (pid, _) in event["new"].items()}
            elif event["event"] == "standbys":
                self.standbys = tuple(event["pids"])
        self.committed = max([self.committed, *(row["step"] for row in commits)])


class Watch:
    """Follow the files of a run.

    Args:
        runs: folder that contains the run's folder.
        commits: file of the committed versions.
    """

    def __init__(self, runs: Path, commits: Path) -> None:
        self.view = View()
        self._runs = runs
        self._ledger: Tail | None = None
        self._commits = Tail(commits)

    def look(self) -> View:
        """Read what is new, and return the view."""
        if self._ledger is None:
            self._ledger = next((Tail(path) for path in self._runs.glob("*/ledger.jsonl")), None)
        self.view.take(self._ledger.read() if self._ledger else [], self._commits.read())
        return self.view
