"""Inject faults from outside a run: wait for the moment of each fault, then cause it."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from benchmarks.soak.processes import is_descendant
from benchmarks.soak.scenario import OutsideFault, OutsideKind, Phase
from benchmarks.soak.watching import View, Watch
from lightning_ckptless.replica.slot import HEADER_BYTES, SlotName, read_header

LOOK_S = 0.005
FULL_S = 1.0
"""Seconds for which a disk is full."""
FLIPPED_BYTES = 3


Action = Callable[[OutsideFault, View], bool]
"""Causes a fault; returns whether it has a target."""


def moment_of(fault: OutsideFault, view: View) -> float | None:
    """Return the wall clock at which a fault is due; None if the event that it follows has not occurred.

    Args:
        fault: fault to inject.
        view: what is known of the run so far.
    """
    if fault.phase is None:
        return 0.0 if view.committed >= fault.step else None
    step = f"step={fault.step}"
    # A fault's kind, rank and step come first.
    fired = [e.at for e in view.events if e.event == Phase.FIRED and step in e.fields["fault"].split(":")[:3]]
    if not fired:
        return None
    began = [event.at for event in view.events if event.event == fault.phase and event.at >= fired[0]]
    return began[0] + fault.delay_s if began else None


class OutsideFaults:
    """A thread that injects the outside faults of a run. A context manager.

    Args:
        faults: faults to inject.
        watch: watch on the run.
        actions: action for each kind.

    Attributes:
        struck: injected faults in words, in order.
    """

    def __init__(
        self,
        faults: Sequence[OutsideFault],
        watch: Watch,
        actions: Mapping[OutsideKind, Action],
    ) -> None:
        self.struck: list[str] = []
        self._due: dict[OutsideFault, float | None] = dict.fromkeys(faults)
        self._watch = watch
        self._actions = actions
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak-outside-faults")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while self._due and not self._over.wait(LOOK_S):
            view, now = self._watch.look(), time.time()
            for fault in list(self._due):
                if self._due[fault] is None and (moment := moment_of(fault, view)) is not None:
                    # If it follows no other fault, the delay counts from when the commit of the step was seen.
                    self._due[fault] = moment or now + fault.delay_s
                at = self._due[fault]
                if at is not None and now >= at:
                    del self._due[fault]
                    if self._actions[fault.kind](fault, view):
                        self.struck.append(str(fault))


# ---------------------------------------------------------------------- what is done


def send(pid: int | None, number: signal.Signals) -> bool:
    """Send a signal to a process of this soak test, if there is such a process."""
    if pid is None or not is_descendant(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def limit_memory(pid: int | None) -> bool:
    """Limit a worker's address space to its current size."""
    if pid is None or not is_descendant(pid):
        return False
    with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        used_bytes = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (used_bytes, used_bytes))
        return True
    return False


def flip_bytes(arenas: Path, shard: int, chance: random.Random) -> bool:
    """Flip bits in the newest committed version of a shard in its source rank's own slots.

    Args:
        arenas: folder of the arenas.
        shard: index of the shard.
        chance: random generator that chooses the bits.
    """
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
    """Return the process id of the sidecar, which writes durable states; None if it cannot be determined.

    Args:
        fork_server: process id of the parent of sidecar and workers.
        known: process ids of workers and standbys.
    """
    if fork_server is None:
        return None
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(fork_server).children()
        others = [child.pid for child in children if child.pid not in known and child.status() != psutil.STATUS_ZOMBIE]
        return others[0] if len(others) == 1 else None
    return None
