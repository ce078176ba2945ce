"""Durable states as seen by a trainer: requesting the writer, and bringing a state back into the arenas.

Each rank puts its own shard into its own slot, with the version, layout and checksum that it was staged with. From
there on the state is restored like any version in the arenas, by the same code and with the same exactness.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_ckptless.durable.capture import ShardCopy
from lightning_ckptless.durable.folder import DurableFolder, Manifest
from lightning_ckptless.durable.places import read_places
from lightning_ckptless.durable.store import read_layout, read_shard
from lightning_ckptless.durable.writer_settings import MODULE, WriterSettings
from lightning_ckptless.errors import DurableError, OptionsError
from lightning_ckptless.formats.pickles import UntrustedError, admit
from lightning_ckptless.ledger import LEDGER_NAME
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.durable_schedule import DurableState, newest_first, share_of
from lightning_ckptless.protocol.messages import StartSidecar
from lightning_ckptless.protocol.versions import Complete, Missing, Snapshot, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Transport, gather_json
from lightning_ckptless.trainer.session.identity import Identity
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.trust import how_to_trust

log = logging.getLogger(__name__)


class DurableRung:
    """Durable states of one call of `fit`.

    Args:
        identity: identity of this worker.
        fit_index: number of earlier calls of `fit` in this process; each call has its own folder.
        options: the user's settings.
    """

    def __init__(self, identity: Identity, fit_index: int, options: CkptlessOptions) -> None:
        self._identity = identity
        self._options = options
        given = options.durable_dir
        path = (given or identity.run_folder / "durable").absolute()
        self.folder = DurableFolder(path.with_name(f"{path.name}.{fit_index}") if fit_index else path)
        self._is_on = options.durable_every_n_steps is not None or options.durable_every_s is not None
        self._is_named = given is not None
        self._logger_identities: dict[str, list[dict[str, Any]] | None] = {}

    # ------------------------------------------------------------------ reading

    def states(self, transport: Transport) -> list[DurableState]:
        """The states that all ranks can read, newest first. All ranks call it together.

        Raises:
            OptionsError: the folder was not created by this package.
        """
        if self._is_on or self._is_named:
            self.folder.require_ours()
        mine = self.folder.states()
        self._logger_identities = {str(path): manifest.logger_identities for path, manifest in mine}
        for path, why in self.folder.left_out.items() if transport.rank == 0 else ():
            log.warning("ckptless: durable state %s is ignored: %s", path, why)
        own = [asdict(manifest.state(path)) for path, manifest in mine]
        seen = [{_state(fields) for fields in states} for states in gather_json(transport, own)]
        return newest_first(list(set.intersection(*seen)))

    def logger_identities(self, state: DurableState) -> list[dict[str, Any]] | None:
        """The logger runs that a state's loggers write to."""
        return self._logger_identities.get(state.path)

    def bring(self, state: DurableState, members: MemberSet) -> Complete | str:
        """Replace the contents of the arenas by a durable state. All ranks call it together.

        Returns:
            The version as it is now in the arenas, or why the state cannot be used; the arenas are then unchanged.
        """
        arena, rank = members.arena, members.rank
        mine = _read(state, range(rank, state.snapshot.world_size, members.world_size), members.trusted)
        problems = [text for (text,) in members.gather([mine if isinstance(mine, str) else ""]) if text]
        if isinstance(mine, str) or problems:
            log.warning("ckptless: %s cannot be used: %s", state, problems[0])
            return str(problems[0])
        layout, copies = mine
        if members.is_node_leader:
            arena.clear()
            arena.write_layout(layout)
            arena.write_notes(ArenaNotes(origin=state.origin or ""))
        members.transport.agree(True)
        arena.require_space_for(
            (
                (shard, holder)
                for holder in members.ranks_of_node
                for shard in range(holder, state.snapshot.world_size, members.world_size)
            ),
            layout,
        )
        for shard, copy in copies.items():
            pair = arena.slots(shard, rank, copy.bulk.numel(), layout=layout.digest)
            _put(pair[0], copy, state.snapshot, shard, rank)
            for slot in pair:
                slot.close()
        members.transport.agree(True)
        found = choose(arena, members.transport, members.nodes)
        return found.reason if isinstance(found, Missing) else found

    # ------------------------------------------------------------------ writing

    def assign_writer(self, members: MemberSet) -> None:
        """Record which shards this node's writer writes. All ranks call it.

        Raises:
            OptionsError: several nodes would have to write, and the options do not say at which steps.
        """
        if not self._is_on:
            return
        n, mirrored = self._options.durable_every_n_steps, self._options.mirror_every_n_steps
        steps = None if n is None or mirrored == "auto" else math.lcm(n, mirrored)
        nodes = members.nodes
        share = share_of(nodes[members.rank], members.placement.holders, nodes, steps)
        if not any(share_of(node, members.placement.holders, nodes, steps).is_whole for node in nodes) and not steps:
            raise OptionsError(
                f"with copies={self._options.copies} no node holds all {len(nodes)} shards, so {len(set(nodes))} nodes "
                "write each durable state together, at steps known in advance: set durable_every_n_steps, and set "
                "mirror_every_n_steps to a number"
            )
        if members.is_node_leader:
            members.arena.write_notes(ArenaNotes(durable_share=share))

    def request_writer(self, arena: Arena, channel: AgentChannel | None) -> None:
        """Request a writer process from this node's agent, if this node writes any shards.

        Args:
            arena: arena of this node.
            channel: channel to our agent; None under an external agent.
        """
        share = arena.notes().durable_share
        if not self._is_on or share is None or not share.shards:
            return
        settings = WriterSettings(
            arena=str(arena.path),
            folder=str(self.folder.path),
            ledger=str(self._identity.run_folder / LEDGER_NAME),
            run_id=self._identity.run_id,
            agent_pid=self._identity.agent_pid,
            every_n_steps=self._options.durable_every_n_steps,
            every_s=self._options.durable_every_s,
            keep=self._options.durable_keep,
        )
        if channel is not None:
            channel.send(StartSidecar(MODULE, settings.to_text()))
        elif not self._identity.own_agent and arena.notes().writer_agent != settings.agent_pid:
            _start_detached(settings)
            arena.write_notes(ArenaNotes(writer_agent=settings.agent_pid))


def _read(
    state: DurableState, shards: Iterable[int], trusted: Collection[str]
) -> tuple[Layout, dict[int, ShardCopy]] | str:
    """Read some shards of a state; returns why if that is impossible."""
    path = Path(state.path)
    try:
        layout, manifest, places = read_layout(path), Manifest.read(path), read_places(path)
        copies = {shard: read_shard(path, manifest, layout, places, shard) for shard in shards}
        for copy in copies.values():
            admit(copy.blob, trusted)
    except DurableError as error:
        return str(error)
    except UntrustedError as error:
        return f"{path}: {error}{how_to_trust(error)}"
    return layout, copies


def _put(slot: Slot, copy: ShardCopy, snapshot: Snapshot, shard: int, holder: int) -> None:
    stamp = Stamp(snapshot.version, snapshot.generation, snapshot.world_size, snapshot.layout, shard, holder)
    slot.begin(stamp)
    slot.bulk.copy_(copy.bulk)
    slot.seal(stamp, copy.blob, copy.checksum)
    slot.commit()


def _state(fields: dict[str, Any]) -> DurableState:
    snapshot = fields["snapshot"] | {"version": Version(**fields["snapshot"]["version"])}
    return DurableState(**(fields | {"snapshot": Snapshot(**snapshot)}))


def _start_detached(settings: WriterSettings) -> None:
    """Under an external agent: start a process that init adopts, and that exits once the agent has exited."""
    subprocess.run(
        [sys.executable, "-m", MODULE, settings.to_text(), "--detach"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
