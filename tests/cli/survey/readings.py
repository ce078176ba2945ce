"""Readings of an invented run: two ranks on two nodes, with copies on each other's node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.cli.survey.reading import ArenaReading, NodeReading, Reading
from lightning_ckptless.ledger import Event
from lightning_ckptless.membership.worker.progress import WorkerProgress
from lightning_ckptless.protocol.hang_detection import Point, RankProgress
from lightning_ckptless.protocol.versions import Replica, SlotState, Version
from lightning_ckptless.replica.arena import ArenaInfo, Owner

NOW = 2000.0
NODES = ("a", "b")


def event(name: str, before_s: float, rank: int | None = None, **fields: Any) -> Event:
    """An event that was recorded some seconds before now."""
    return Event(name, NOW - before_s, 1, rank, fields)


def spawned(node: str, rank: int, before_s: float = 100.0) -> Event:
    """The start of a node's worker; its process id is 10 and the rank, that of its agent is 60 and the rank."""
    facts: dict[str, Any] = {"node": node, "host": "here", "agent": 60 + rank, "folder": f"/tmp/{node}"}
    return event("workers_spawned", before_s, pids={str(rank): 10 + rank}, **facts)


def placed(copies: int = 1, before_s: float = 90.0, nodes: tuple[str, ...] = NODES) -> Event:
    """The placement of one shard per node, with a copy of each on the next node."""
    holders = [[(shard + 1) % len(nodes)] if copies else [] for shard in range(len(nodes))]
    facts: dict[str, Any] = {"kind": "node", "copies": copies, "holders": holders, "nodes": nodes, "domains": nodes}
    return event("placement", before_s, 0, sizes_bytes=[64] * len(nodes), **facts)


def replica(shard: int, holder: int, step: int = 7, state: SlotState = SlotState.COMMITTED) -> Replica:
    """A copy of a shard on its holder's node."""
    return Replica(shard, holder, NODES[holder], 0, Version(step, True), 1, 2, "layout", state, 64, 8, "")


def time_spent(before_s: float, **seconds: float) -> Event:
    """A report of the time of a run, by bucket, which began so many seconds before the report."""
    until = NOW - before_s
    facts = {"began_at": until - sum(seconds.values()), "until": until, "seconds": seconds, "is_over": False}
    return event("time_spent", before_s, 0, **facts, failures=1, steps_replayed=1, step=6, versions=6)


ALL_COPIES = tuple(replica(shard, holder) for shard in (0, 1) for holder in (0, 1))


def worker(rank: int, step: int = 8, point: Point = Point.BACKWARD, *, silent_s: float = 0.0, **more: Any) -> Any:
    """The progress of a worker that has been silent for some seconds."""
    facts: dict[str, Any] = {"longest_pause_s": 0.1, "own_s": 0.05} | more
    progress = RankProgress(step, point, 0, NOW - silent_s, **facts)
    return WorkerProgress(rank, 0, 10 + rank, is_running=True, progress=progress)


def reading(
    events: Iterable[Event] = (),
    *,
    copies: Iterable[Replica] = ALL_COPIES,
    written_before_s: float = 0.2,
    workers: Iterable[WorkerProgress] = (),
    states: Mapping[int, str] | None = None,
    dead_agents: Iterable[str] = (),
    free_bytes: int = 1 << 30,
    hosted: Iterable[str] = NODES,
) -> Reading:
    """A reading of a run with two nodes, whose clock of progress is the wall clock."""
    history = History()
    for each in (
        spawned("a", 0),
        spawned("b", 1),
        event("run_started", 99.0, 0, arena="/shm/x", world_size=2),
        *events,
    ):
        history.add(each)
    owners = {name: Owner(60 + rank, 1.0) for rank, name in enumerate(NODES)}
    kept = {name: {one: NOW - written_before_s for one in copies if one.node == name} for name in hosted}
    arenas = tuple(
        ArenaReading(_info(name, owners[name], alive=name not in dead_agents), found, 0) for name, found in kept.items()
    )
    nodes = {
        name: NodeReading(
            name not in dead_agents,
            tuple(one for one in workers if one.rank == rank),
            {10 + rank: (states or {}).get(rank, "S")},
        )
        for rank, name in enumerate(NODES)
        if name in hosted
    }
    return Reading("run", Path("/runs/run"), NOW, NOW, history, arenas, nodes, free_bytes)


def _info(node: str, owner: Owner, *, alive: bool) -> ArenaInfo:
    return ArenaInfo(Path(f"/shm/ckptless-run-{node}"), "run", node, owner, alive, 1000, 1.0, None)
