"""Faults from outside a run: what is known of it while it runs, the moment of each fault, and what then happens."""

from __future__ import annotations

import json
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from lightning_ckptless.ledger import LEDGER_NAME, Event, LedgerTail
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.slot import HEADER_BYTES, SlotName, read_header
from tests.soak.scenario import OutsideFault, OutsideKind, Phase

LOOK_S = 0.005
FULL_S = 1.0
"""Seconds for which a disk is full."""
FLIPPED_BYTES = 3


class Commit(NamedTuple):
    """A version that a rank has seen committed, and when."""

    at: float
    version: Version


def commits_of(path: Path) -> list[Commit]:
    """Return the committed versions that ranks have recorded, by time; torn lines are left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
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
        self.events += events
        for event in events:
            if event.event == "workers_spawned":
                self.pids |= {int(rank): pid for rank, pid in event.fields["pids"].items()}
            elif event.event == "in_place":
                self.pids |= {int(rank): pid for rank, (pid, _) in event.fields["new"].items()}
            elif event.event == "standbys":
                self.standbys = tuple(event.fields["pids"])


class Watch:
    """Follow a run by the ledger in its folder of runs, and by the file of committed versions."""

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
            self.view.committed = max((c.version.optimizer_step for c in commits_of(self._commits)), default=-1)
        return self.view


# ---------------------------------------------------------------------- when

Action = Callable[[OutsideFault, View], bool]
"""Causes a fault; returns whether it has a target."""


def moment_of(fault: OutsideFault, view: View) -> float | None:
    """Return the wall clock at which a fault is due; None if the event that it follows has not occurred."""
    if fault.phase is None:
        return 0.0 if view.committed >= fault.step else None
    step = f"step={fault.step}"
    # A fault's kind, rank and step come first.
    fired = [e.at for e in view.events if e.event == Phase.FIRED and step in e.fields["fault"].split(":")[:3]]
    began = [e.at for e in view.events if fired and e.event == fault.phase and e.at >= fired[0]]
    return began[0] + fault.delay_s if began else None


@contextmanager
def outside_faults(
    faults: Sequence[OutsideFault], watch: Watch, actions: Mapping[OutsideKind, Action]
) -> Iterator[list[str]]:
    """Inject faults in a thread while the block runs; yields the list of those that had a target, in words."""
    struck: list[str] = []
    due: dict[OutsideFault, float | None] = dict.fromkeys(faults)
    over = threading.Event()

    def inject() -> None:
        while due and not over.wait(LOOK_S):
            view, now = watch.look(), time.time()
            for fault in list(due):
                if due[fault] is None and (moment := moment_of(fault, view)) is not None:
                    # If it follows no other fault, the delay counts from when the commit of the step was seen.
                    due[fault] = moment or now + fault.delay_s
                if (at := due[fault]) is not None and now >= at:
                    del due[fault]
                    if actions[fault.kind](fault, view):
                        struck.append(str(fault))

    thread = threading.Thread(target=inject, name="soak-outside-faults")
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------- what


def is_descendant(pid: int | None) -> bool:
    """Return whether a process is a descendant of this one; only those may receive faults."""
    with suppress(psutil.NoSuchProcess):
        return pid is not None and any(parent.pid == os.getpid() for parent in psutil.Process(pid).parents())
    return False


def send(pid: int | None, number: int) -> bool:
    """Send a signal to a process of this soak test, if there is such a process."""
    if pid is not None and is_descendant(pid):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
    return False


def limit_memory(pid: int | None) -> bool:
    """Limit a worker's address space to its current size."""
    if pid is not None and is_descendant(pid):
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            used_bytes = psutil.Process(pid).memory_info().vms
            resource.prlimit(pid, resource.RLIMIT_AS, (used_bytes, used_bytes))
            return True
    return False


def flip_bytes(arenas: Path, shard: int, chance: random.Random) -> bool:
    """Flip random bits in the newest committed version of a shard in its source rank's own slots."""
    found = []
    for path in arenas.glob("ckptless-*/*"):
        name = SlotName.parse(path.name)
        if name is None or name.shard != shard or name.holder != shard:
            continue
        with suppress(Exception):
            header = read_header(path)
            if header is not None and header.state.value == "committed":
                found.append((header.stamp.version, path, header.bulk_bytes + header.blob_bytes))
    if not found:
        return False
    _, path, length = max(found)
    with path.open("r+b") as file:
        for _ in range(FLIPPED_BYTES):
            offset = HEADER_BYTES + chance.randrange(length)
            file.seek(offset)
            old = file.read(1)
            file.seek(offset)
            file.write(bytes([old[0] ^ (1 << chance.randrange(8))]))
    return True


def fill_disk(folder: Path) -> bool:
    """Fill the disk of a folder for `FULL_S` seconds."""
    if not os.path.ismount(folder):
        return False
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 65536):
            pass
    threading.Timer(FULL_S, lambda: ballast.unlink(missing_ok=True)).start()
    return True


def sidecar_of(fork_server: int | None, known: Sequence[int]) -> int | None:
    """Return the child of a fork server that writes durable states, which is no known worker; None if unclear."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(fork_server).children() if fork_server is not None else []
        others = [child.pid for child in children if child.pid not in known and child.status() != psutil.STATUS_ZOMBIE]
        return others[0] if len(others) == 1 else None
    return None
