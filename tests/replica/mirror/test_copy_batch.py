"""Small pieces that lie side by side are concatenated into the slot; all others are left to copies of their own."""

from __future__ import annotations

import pytest
import torch

from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.replica.layout.layout import Chunk, aligned, slot_view
from lightning_ckptless.replica.mirror.copy_batch import SMALL_BYTES, CopyBatch, LatePiece

OTHER = 0xAA


def pieces_of(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[LatePiece]]:
    """A bulk full of other bytes, and one piece in it for each tensor."""
    chunks: list[Chunk] = []
    end = 0
    for name, tensor in tensors.items():
        sizes, at = tuple(tensor.shape), aligned(end)
        chunks.append(Chunk(name, str(tensor.dtype), sizes, (0,) * len(sizes), sizes, 0, at, tensor.nbytes))
        end = at + tensor.nbytes
    bulk = torch.full((end,), OTHER, dtype=torch.uint8)
    return bulk, [LatePiece(chunk, chunk.name, slot_view(chunk, bulk), tensors[chunk.name]) for chunk in chunks]


SMALL = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "step": torch.tensor(7.0),
    "flags": torch.tensor([True, False, True]),
    "half": torch.tensor([-0.0, float("nan")], dtype=torch.bfloat16),
    "count": torch.tensor([2**40]),
}
APART = {
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "conjugated": torch.tensor([1 + 2j, 3j]).conj(),
    "large": torch.rand(SMALL_BYTES // 4),
}


def test_small_pieces_are_copied_without_a_copy_of_their_own() -> None:
    bulk, pieces = pieces_of(SMALL)
    with torch.device("meta"):
        batch = CopyBatch(bulk, pieces)
    assert not batch.targets and not batch.sources
    batch.concatenate()
    for piece in pieces:
        same = piece.target.reshape(-1).view(torch.uint8), piece.source.reshape(-1).view(torch.uint8)
        assert torch.equal(*same), piece.name


@pytest.mark.parametrize("name", APART)
def test_a_piece_that_cannot_be_read_as_bytes_or_is_large_is_copied_by_itself(name: str) -> None:
    bulk, pieces = pieces_of({"first": torch.ones(2), "second": torch.ones(3), name: APART[name], **SMALL})
    batch = CopyBatch(bulk, pieces)
    assert [id(source) for source in batch.sources] == [id(APART[name])]
    batch.concatenate()
    foreach_copy(batch.targets, batch.sources)
    assert all(torch.equal(piece.target.nan_to_num(), piece.source.nan_to_num()) for piece in pieces)


def test_what_lies_between_two_pieces_is_not_overwritten() -> None:
    bulk, pieces = pieces_of({name: torch.full((20,), float(number)) for number, name in enumerate("abcde")})
    middle = pieces.pop(2)
    CopyBatch(bulk, pieces).concatenate()
    assert [piece.target[0].item() for piece in pieces] == [0, 1, 3, 4]
    assert set(middle.target.view(torch.uint8).tolist()) == {OTHER}


def test_a_piece_without_neighbours_is_copied_by_itself() -> None:
    bulk, pieces = pieces_of({"a": torch.zeros(20), "b": torch.ones(20), "c": torch.ones(20)})
    assert len(CopyBatch(bulk, [pieces[0], pieces[2]]).targets) == 2
