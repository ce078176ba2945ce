"""The member set: the ranks of one generation, with their transport and the arena of each."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.failure_domains import place_in
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.broadcast import broadcast
from lightning_ckptless.replica.transport import Transport, gather_json
from lightning_ckptless.trainer.session.failure_domains import find_domains


@dataclass(frozen=True)
class MemberSet:
    """The ranks of one generation, as seen by one of them.

    Args:
        transport: connects all ranks.
        arena: arena of this rank's node.
        nodes: node name of each rank.
        placement: which rank holds which replicas.
        generation: number of the generation; no other generation has written to these arenas under this number.
        notes: notes of the arena of each rank's node when the generation began, by rank.
        trusted: dotted names of classes that the user trusts in host state from other nodes.
    """

    transport: Transport
    arena: Arena
    nodes: tuple[str, ...]
    placement: Placement
    generation: int
    notes: tuple[ArenaNotes, ...]
    trusted: frozenset[str] = frozenset()

    @property
    def rank(self) -> int:
        """This rank."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.transport.world_size

    @property
    def ranks_of_node(self) -> tuple[int, ...]:
        """The ranks that share this one's arena."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank])

    @property
    def rings_of_node(self) -> list[tuple[int, int]]:
        """(shard, holder) of the slot rings of all ranks of this node."""
        ranks = self.ranks_of_node
        return [(shard, rank) for rank in ranks for shard in (rank, *self.placement.sources(rank))]

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank acts for its node: it is the lowest one there."""
        return self.rank == self.ranks_of_node[0]

    @property
    def sole_shards(self) -> list[int]:
        """The shards of which this rank's node has all copies."""
        nodes, holders = self.nodes, self.placement.holders
        mine = nodes[self.rank]
        return [rank for rank, others in enumerate(holders) if {nodes[holder] for holder in (rank, *others)} == {mine}]

    def gather(self, facts: Mapping[str, Any] | list[Any]) -> list[Any]:
        """Exchange values; returns those of all ranks, by rank."""
        return gather_json(self.transport, facts)

    @property
    def noted(self) -> ArenaNotes:
        """Each note from the first arena that has it."""
        return ArenaNotes.merged(self.notes)


class GenerationCount(Protocol):
    """The number of the last generation, stored outside the arenas in case all of them are lost."""

    def last(self) -> int:
        """Number of the last generation; 0 if none was recorded or the record cannot be read."""

    def record(self, number: int) -> None:
        """Record the number of a generation."""


class GenerationFile:
    """A generation count in a file of the run folder.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def last(self) -> int:
        """See `GenerationCount.last`."""
        try:
            return max(0, int(self._path.read_text()))
        except (OSError, ValueError):
            return 0

    def record(self, number: int) -> None:
        """See `GenerationCount.record`."""
        # Several nodes may share the folder, and their processes may have the same ids.
        draft = self._path.with_name(f".{self._path.name}-{uuid.uuid4().hex}")
        # A run whose folder cannot be written trains without it; its ledger reports that.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(str(number))
            draft.replace(self._path)


def form_member_set(
    transport: Transport,
    arena: Arena,
    nodes: tuple[str, ...],
    options: CkptlessOptions,
    generation: int,
    *,
    count: GenerationCount,
    after: int = 0,
    mesh: tuple[int, int] | None = None,
) -> MemberSet:
    """Form the member set of a generation. All ranks call it together.

    Generation numbers never repeat: a restarted run continues the count of the arenas and the run folder.

    Args:
        transport: connects all ranks.
        arena: arena of this rank's node.
        nodes: node name of each rank.
        options: the user's settings.
        generation: number of the generation that was joined.
        count: number of the last generation outside the arenas.
        after: generation that wrote the newest state stored outside the arenas.
        mesh: ranks in each dimension of the device mesh; None without a mesh.

    Raises:
        OptionsError: replicas cannot be placed, or the failure domain of a node is unknown.
    """
    domains = find_domains(options.failure_domain, nodes, transport, mesh)
    placement = place_in(domains, options.copies if transport.world_size > 1 else 0)
    mine = arena.notes()
    used = mine.generation
    if used is None:
        # If the note was lost, the replicas still show which numbers were used.
        used = max((replica.generation for replica in arena.inventory()), default=0)
    mine = replace(mine, generation=max(used, count.last()))
    notes = _gather_notes(mine, transport)
    number = max([generation, after + 1, *(n.generation + 1 for n in notes if n.generation is not None)])
    members = MemberSet(transport, arena, nodes, placement, number, notes, frozenset(options.trusted_classes))
    if members.is_node_leader:
        arena.write_notes(ArenaNotes(generation=number))
        count.record(number)
    return members


def _gather_notes(mine: ArenaNotes, transport: Transport) -> tuple[ArenaNotes, ...]:
    """The notes of all ranks' arenas; the folders of all ranks are sent to those whose arena lacks them only."""
    data = b"" if mine.folders is None else json.dumps(ArenaNotes(folders=mine.folders).to_values()).encode()
    facts = gather_json(transport, [replace(mine, folders=None).to_values(), len(data)])
    common = broadcast(transport, [length for _, length in facts], data)
    folders = ArenaNotes.from_values(json.loads(common)).folders if common else None
    return tuple(replace(ArenaNotes.from_values(values), folders=folders) for values, _ in facts)
