"""Compare, in turns, what ranks have of the shards that they neither write nor keep.

A version is compared between the writer of a shard and its holders. All other ranks have the same replicated tensors,
and compute gradients with them. So in each round, every rank computes the digest of a part of one further shard from
its own tensors, and sends it to the writer, which compares it with what its slot contains:

    k = 1 + n mod (N - 1)   in round n, rank r compares shard r - k, and its own shard is compared by rank r + k

Each rank sends and receives one short message per round, whatever the number of ranks. All parts of all shards have
been compared on all ranks after N - 1 times as many rounds as the largest shard has parts. A part is at most 4 MiB, so
the digests take less than a millisecond, or it is one piece, of which a shard has some dozens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Chunk, Layout, part_of
from lightning_ckptless.replica.mirror.exchange import AUDIT
from lightning_ckptless.replica.transport import Message, receive_buffer, tensor_of

ALGORITHM = "xxh3"
PART_BYTES = 4 << 20
DIGEST_BYTES = 64
"""Length of a message: a digest, padded with zeros. Only zeros say nothing."""


@dataclass(frozen=True)
class Turn:
    """What a rank takes part in, in one round.

    Args:
        shard: shard that it compares for another rank; None if it writes or keeps the one whose turn it is.
        auditor: rank that compares this rank's shard; None if that rank keeps it.
        part: number of the part, counted over all rounds.
    """

    shard: int | None
    auditor: int | None
    part: int


NO_TURN = Turn(None, None, 0)


class Audited:
    """A part of a shard in live tensors, in one round.

    Args:
        views: the pieces, as views of live tensors.
        tensors: the tensors.
    """

    def __init__(self, views: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        self._views = views
        self._watched = [(tensor, version_counter(tensor)) for tensor in tensors]

    def digest(self) -> str:
        """The digest; empty if there is nothing to compare, or a tensor was written to since the round was begun."""
        if not self._views or any(view.device.type != "cpu" for view in self._views):
            return ""
        found = _digest(self._views)
        return found if all(version_counter(tensor) == count for tensor, count in self._watched) else ""


class Rotation:
    """The turns of one rank.

    Args:
        layout: layout of the state.
        rank: this rank.
        holders: for each shard the ranks, other than its writer, that keep a copy; nothing is compared if no rank
            keeps any.
    """

    def __init__(self, layout: Layout, rank: int, holders: Sequence[Sequence[int]]) -> None:
        self._layout = layout
        self._rank = rank
        self._holders = holders
        self._others = layout.world_size - 1 if any(holders) else 0
        self._parts = [
            _divide([chunk for chunk in layout.of(s) if not chunk.holders]) for s in range(layout.world_size)
        ]

    @property
    def rounds(self) -> int:
        """Rounds after which every rank has compared every part."""
        return self._others * max(map(len, self._parts))

    def turn(self, number: int) -> Turn:
        """What this rank takes part in.

        Args:
            number: number of the round, the same on all ranks.
        """
        if not self._others:
            return NO_TURN
        step = 1 + number % self._others
        shard, auditor = ((self._rank + offset) % self._layout.world_size for offset in (-step, step))
        return Turn(
            None if self._rank in self._holders[shard] else shard,
            None if auditor in self._holders[self._rank] else auditor,
            number // self._others,
        )

    def live(self, turn: Turn, tensors: Mapping[str, torch.Tensor], changing: Collection[str]) -> Audited:
        """The part to compare in this rank's tensors.

        Args:
            turn: the turn.
            tensors: live tensors by name.
            changing: names of tensors that may change at any time, the same on all ranks.
        """
        if turn.shard is None:
            return Audited((), ())
        chunks, held = self._part(turn.shard, turn.part, changing), self._layout.held_by(self._rank)
        views = [part_of(tensors[chunk.name], chunk, held[chunk.name].box.offsets) for chunk in chunks]
        return Audited(views, [tensors[name] for name in dict.fromkeys(chunk.name for chunk in chunks)])

    def messages(self, turn: Turn, found: str) -> tuple[list[Message], list[Message]]:
        """The messages to send and to receive.

        Args:
            turn: the turn.
            found: digest of what this rank compares for another one; empty if it has none.
        """
        sends: list[Message] = []
        if turn.shard is not None:
            sends.append((turn.shard, AUDIT, tensor_of(found.encode().ljust(DIGEST_BYTES, b"\0"))))
        receives = [] if turn.auditor is None else [(turn.auditor, AUDIT, receive_buffer(DIGEST_BYTES))]
        return sends, receives

    def differs(self, turn: Turn, received: Sequence[Message], bulk: torch.Tensor, changing: Collection[str]) -> bool:
        """Whether the rank that compares this rank's shard has other bytes.

        Args:
            turn: the turn.
            received: the messages that were received.
            bulk: tensor state of this rank's own slot.
            changing: see `live`.
        """
        told = [bytes(bytes_of(data)).rstrip(b"\0").decode() for _, _, data in received]
        if not any(told):
            return False
        chunks = self._part(self._rank, turn.part, changing)
        return told != [_digest([bulk[chunk.at : chunk.at + chunk.nbytes] for chunk in chunks])]

    def _part(self, shard: int, number: int, changing: Collection[str]) -> list[Chunk]:
        parts = self._parts[shard]
        return [chunk for chunk in parts[number % len(parts)] if chunk.name not in changing]


def _divide(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Divide the pieces of a shard into parts of limited size."""
    parts: list[list[Chunk]] = [[]]
    part_bytes = 0
    for chunk in chunks:
        if parts[-1] and part_bytes + chunk.nbytes > PART_BYTES:
            parts.append([])
            part_bytes = 0
        parts[-1].append(chunk)
        part_bytes += chunk.nbytes
    return parts


def _digest(views: Sequence[torch.Tensor]) -> str:
    flat = [view.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for view in views]
    return digest(ALGORITHM, [bytes_of(data) for data in flat])
