"""Find the pieces in which the replicas of a version differ, by their digests in the slots of all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from lightning_ckptless.protocol.divergence import Difference, Piece, different_pieces
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Chunk, Layout, local_name, part_of
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.transport import Transport, gather_json

ALGORITHM = "xxh3"


def locate_difference(
    version: Version, differing: Collection[int], written: Mapping[int, Slot], layout: Layout, transport: Transport
) -> Difference:
    """Compare the slots of all ranks piece by piece. Collective.

    Args:
        version: the version.
        differing: shards that this rank holds and whose source has other bytes.
        written: this rank's slots with the version, by shard.
        layout: layout of the version.
        transport: transport between all ranks.

    Raises:
        TransportError: a peer is lost.
    """
    shards = sorted({shard for of_rank in gather_json(transport, sorted(differing)) for shard in of_rank})
    mine = {
        shard: [digest(ALGORITHM, [bytes_of(written[shard].bulk[c.at : c.at + c.nbytes])]) for c in layout.of(shard)]
        for shard in shards
        if shard in written
    }
    found = gather_json(transport, {str(shard): digests for shard, digests in mine.items()})
    pieces = [
        _piece(chunk, {rank: of_rank[str(shard)][index] for rank, of_rank in enumerate(found) if str(shard) in of_rank})
        for shard in shards
        for index, chunk in enumerate(layout.of(shard))
    ]
    return Difference(version, different_pieces(pieces), tuple(shards))


def compare_live(
    difference: Difference, layout: Layout, tensors: Mapping[str, torch.Tensor], transport: Transport
) -> tuple[Piece, ...]:
    """Compare the live tensors of all ranks where replicas differed, while no rank changes them. Collective.

    Args:
        difference: the difference.
        layout: layout of its version.
        tensors: this rank's live tensors by name; of a sharded tensor, the local part.
        transport: transport between all ranks.

    Returns:
        The pieces that differed, or all of the shards if those are unknown, with the digests of all ranks.

    Raises:
        TransportError: a peer is lost.
    """
    rank, corners = transport.rank, {(piece.name, piece.offsets) for piece in difference.pieces}
    known = [chunk for chunk in layout.chunks if (chunk.name, chunk.offsets) in corners]
    chunks = known or [chunk for shard in difference.shards for chunk in layout.of(shard) if not chunk.holders]
    held = layout.held_by(rank)
    mine: list[str] = []
    for chunk in chunks:
        if not chunk.is_held_by(rank):
            mine.append("")
            continue
        name = local_name(chunk, rank)
        live = part_of(tensors[name], chunk, held[name].box.offsets).cpu().contiguous().reshape(-1)
        mine.append(digest(ALGORITHM, [bytes_of(live.view(torch.uint8))]))
    found = gather_json(transport, mine)
    return tuple(
        _piece(chunk, {peer: of_rank[index] for peer, of_rank in enumerate(found) if of_rank[index]})
        for index, chunk in enumerate(chunks)
    )


def _piece(chunk: Chunk, digests: Mapping[int, str]) -> Piece:
    return Piece(chunk.name, chunk.offsets, chunk.sizes, digests)
