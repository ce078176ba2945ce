"""Reads a run, once or again and again: its ledger from where the last reading ended, its arenas, its processes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lightning_ckptless.cli.survey.history import History, Node
from lightning_ckptless.cli.survey.reading import ArenaReading, NodeReading, Reading
from lightning_ckptless.errors import ArenaError
from lightning_ckptless.ledger import LEDGER_NAME, LedgerTail
from lightning_ckptless.membership.worker.progress import read_workers
from lightning_ckptless.protocol.versions import Complete, newest_complete
from lightning_ckptless.replica.arena import Arena, ArenaInfo, default_arena_dir, find_arenas
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.system.procfs import stat_fields

_TRIES = 4
"""How often arenas are read if a version is replaced while they are read."""
_CLOCK_TOLERANCE_S = 2.0
_UNKNOWN_BYTES = 1 << 62


class RunReader:
    """Reads one run.

    Args:
        folder: folder of its ledger.
        arena_dir: folder of its arenas; None for the one in the ledger.
        clock: returns seconds since the epoch.
        host: name of this host.
    """

    def __init__(
        self,
        folder: Path,
        arena_dir: Path | None = None,
        clock: Callable[[], float] = time.time,
        host: str | None = None,
    ) -> None:
        self.run_id = folder.name
        self._folder = folder
        self._arena_dir = arena_dir
        self._clock = clock
        self._host = socket.gethostname() if host is None else host
        self._arenas = _Arenas(self.run_id)
        self._tail = LedgerTail(folder / LEDGER_NAME)
        self._history = History()
        self._agents: dict[tuple[str, float], Owner | None] = {}

    def read(self) -> Reading:
        """Read the run."""
        for event in self._tail.read():
            self._history.add(event)
        history = self._history
        arenas = self._arenas.read(self._arena_dir or history.arena_dir or default_arena_dir())
        nodes = {node.name: self._read_node(node) for node in history.nodes.values() if node.host == self._host}
        return Reading(
            run_id=self.run_id,
            folder=self._folder,
            at=self._clock(),
            clock_s=time.monotonic(),
            history=history,
            arenas=arenas,
            nodes=nodes,
            free_bytes=_free_bytes(self._folder),
        )

    def _read_node(self, node: Node) -> NodeReading:
        start = (node.name, node.spawned_at)
        if start not in self._agents:
            self._agents[start] = _agent_of(node)
        agent = self._agents[start]
        return _workers_of(node, agent_alive=agent is not None and agent.alive())


def arenas_of(run_id: str, arena_dir: Path | None) -> list[ArenaInfo]:
    """Return the arenas of a run on this host; every `fit` of a script has its own arena.

    Args:
        run_id: id of the run.
        arena_dir: folder of the arenas; None for the default.
    """
    found = find_arenas(arena_dir or default_arena_dir())
    return [info for info in found if info.run_id == run_id or info.run_id.startswith(f"{run_id}.")]


class _Arenas:
    """Reads the arenas of a run; searches for them only if some may have been created, adopted or removed.

    Args:
        run_id: id of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._found: list[tuple[ArenaInfo, Arena]] = []
        self._seen: tuple[object, ...] = ()

    def read(self, arena_dir: Path) -> tuple[ArenaReading, ...]:
        """Read them, and read them again if they have changed meanwhile: their headers are not read at one instant.

        Args:
            arena_dir: folder of the arenas.
        """
        self._search(arena_dir)
        before: tuple[ArenaReading, ...] = ()
        for _ in range(_TRIES):
            found = tuple(reading for pair in self._found if (reading := _read_arena(*pair)) is not None)
            replicas = [replica for arena in found for replica in arena.written_at]
            if isinstance(newest_complete(replicas), Complete) or found == before:
                return found
            before = found
        return before

    def _search(self, arena_dir: Path) -> None:
        if self._seen == (arena_dir, *map(_changed_at, [arena_dir, *(info.path for info, _ in self._found)])):
            return
        changed_at = _changed_at(arena_dir)
        self._found.clear()
        for info in arenas_of(self._run_id, arena_dir):
            # It may just have been removed: the run has ended.
            with suppress(ArenaError):
                self._found.append((info, Arena.attach(info.path)))
        self._seen = (arena_dir, changed_at, *(_changed_at(info.path) for info, _ in self._found))


def _changed_at(folder: Path) -> int:
    """Return when an entry of a folder was created, replaced or removed; 0 if there is no such folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _read_arena(info: ArenaInfo, arena: Arena) -> ArenaReading | None:
    """Read an arena; None if it was removed in the meantime: the run has just ended."""
    try:
        return ArenaReading(replace(info, owner_alive=info.owner.alive()), arena.written_at(), arena.torn_headers)
    except FileNotFoundError:
        return None


def _agent_of(node: Node) -> Owner | None:
    """Return the agent of a node; None if it has exited."""
    owner = Owner.running(node.agent, None)
    # A process that began after the workers were started has the process id of an agent that has exited.
    return owner if owner is not None and owner.started_at <= node.spawned_at + _CLOCK_TOLERANCE_S else None


def _workers_of(node: Node, *, agent_alive: bool) -> NodeReading:
    fields = {pid: stat_fields(pid) for pid in node.pids.values()}
    states = {pid: "X" if found is None else found[0] for pid, found in fields.items()}
    return NodeReading(agent_alive, read_workers(node.folder), states)


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return _UNKNOWN_BYTES
    return found.f_bavail * found.f_frsize
