"""Follow a run: the ledger's events, and the versions that ranks have seen committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_ckptless.ledger import LEDGER_NAME, Event, LedgerTail
from lightning_ckptless.protocol.versions import Version


@dataclass(frozen=True)
class Commit:
    """A version that a rank has seen committed, and when."""

    at: float
    version: Version


def commits_of(path: Path) -> list[Commit]:
    """Return the committed versions that ranks have recorded, by time; torn lines are left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append(Commit(row["at"], Version(row["step"], row["validation_done"])))
    return sorted(found, key=lambda commit: commit.at)


@dataclass
class View:
    """What is known of a run at a moment.

    Args:
        events: events of the ledger so far.
        committed: newest optimizer step that a rank has seen committed.
        pids: process ids of the workers, by rank.
        standbys: process ids of the standbys.
    """

    events: list[Event] = field(default_factory=list)
    committed: int = -1
    pids: dict[int, int] = field(default_factory=dict)
    standbys: tuple[int, ...] = ()

    def take(self, events: Sequence[Event]) -> None:
        """Add new events."""
        self.events += events
        for event in events:
            if event.event == "workers_spawned":
                self.pids |= {int(rank): pid for rank, pid in event.fields["pids"].items()}
            elif event.event == "in_place":
                self.pids |= {int(rank): pid for rank, (pid, _) in event.fields["new"].items()}
            elif event.event == "standbys":
                self.standbys = tuple(event.fields["pids"])


class Watch:
    """Follow the files of a run.

    Args:
        runs: folder that contains the run's folder.
        commits: file of the committed versions.
    """

    def __init__(self, runs: Path, commits: Path) -> None:
        self.view = View()
        self._runs, self._commits = runs, commits
        self._ledger: LedgerTail | None = None
        self._read_bytes = 0

    def look(self) -> View:
        """Read what is new, and return the view."""
        if self._ledger is None:
            self._ledger = next((LedgerTail(path) for path in self._runs.glob(f"*/{LEDGER_NAME}")), None)
        self.view.take(self._ledger.read() if self._ledger else ())
        written_bytes = self._commits.stat().st_size if self._commits.exists() else 0
        if written_bytes != self._read_bytes:
            self._read_bytes = written_bytes
            steps = [commit.version.optimizer_step for commit in commits_of(self._commits)]
            self.view.committed = max(steps, default=-1)
        return self.view
