"""The arena of this worker's node: found, adopted from a dead agent, or created."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_ckptless.membership.agent.held_memory import request_memory
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.replica.arena import Arena, Owner, adopt, default_arena_dir, find_arenas, reclaim
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.system.reaper import start_reaper
from lightning_ckptless.trainer.session.identity import Identity

log = logging.getLogger(__name__)


def open_arena(
    identity: Identity,
    fit_index: int,
    options: CkptlessOptions,
    share: Callable[[str, str], str],
    *,
    opens: bool,
    origin: str | None,
) -> Arena:
    """Open the arena of this node, on one rank first, then on the others.

    Args:
        identity: identity of this worker.
        fit_index: number of earlier calls of `fit` in this process; each call has its own arena.
        options: where arenas are stored and how long those of dead runs are kept.
        share: passes a text under a name from one rank to others; see `World.share`.
        opens: whether this rank creates the arena of its node.
        origin: checkpoint path that the script passed to `fit`.
    """
    folder, run_id = _folder(options), _run_id(identity, fit_index)
    arena = _make(folder, run_id, identity, options.arena_keep_s, origin) if opens else None
    path = share(f"arena/{identity.node}", str(arena.path) if arena else "")
    return Arena.attach(Path(path)) if arena is None else arena


def find_arena(identity: Identity, fit_index: int, options: CkptlessOptions) -> Arena | None:
    """Return the arena that the node's other workers use; None if the node is new to the run."""
    for info in find_arenas(_folder(options), _run_id(identity, fit_index)):
        if info.node == identity.node and info.owner.pid == identity.agent_pid:
            return Arena.attach(info.path)
    return None


def find_or_make_arena(identity: Identity, fit_index: int, options: CkptlessOptions) -> Arena:
    """Return the arena that the node's other workers use, or a new one if the node is new to the run."""
    found = find_arena(identity, fit_index, options)
    return found or _make(_folder(options), _run_id(identity, fit_index), identity, options.arena_keep_s, None)


def has_versions(identity: Identity, fit_index: int, options: CkptlessOptions) -> bool:
    """Return whether an arena of a call of `fit` on this machine has versions, whatever process owns it."""
    infos = find_arenas(_folder(options), _run_id(identity, fit_index))
    return any(Arena.attach(info.path).inventory() for info in infos)


def register_with_reaper(arena: Arena, identity: Identity) -> None:
    """Have the arena removed when an external agent, which knows nothing of arenas, exits."""
    agent = identity.agent_pid
    if arena.notes().reaper_agent != agent:
        start_reaper(agent, str(arena.path))
        arena.write_notes(ArenaNotes(reaper_agent=agent))


def use_agent_memory(arena: Arena, channel: AgentChannel | None) -> None:
    """Let our agent hold slots that do not fit into the arena's file system; without effect under an external agent."""
    arena.hold = None if channel is None else partial(request_memory, channel)


def discard_if_empty(arena: Arena) -> None:
    """Remove an arena in which nothing was mirrored, so that a failed start leaves nothing in shared memory."""
    if not arena.inventory():
        arena.remove()


def _folder(options: CkptlessOptions) -> Path:
    return options.arena_dir or default_arena_dir()


def _run_id(identity: Identity, fit_index: int) -> str:
    return f"{identity.run_id}.{fit_index}" if fit_index else identity.run_id


def _make(folder: Path, run_id: str, identity: Identity, keep_s: float, origin: str | None) -> Arena:
    owner = Owner.of(identity.agent_pid)
    for path in reclaim(folder, now=time.time(), keep_s=keep_s):
        log.info("ckptless: removed arena %s: its owner has exited", path)
    for info in find_arenas(folder, run_id):
        if info.node == identity.node and info.owner == owner:
            return Arena.attach(info.path)
    for info in find_arenas(folder, run_id):
        if not info.owner_alive and (arena := adopt(info, node=identity.node, owner=owner)) is not None:
            log.info("ckptless: adopted the arena of %s, whose agent has exited", info.node)
            return arena
    return Arena.create(folder, run_id, identity.node, owner, origin=origin)


def is_first_of_node(local_rank: int) -> bool:
    """Whether this rank acts for its node."""
    return local_rank == 0


def local_rank() -> int:
    """This worker's rank within its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))
