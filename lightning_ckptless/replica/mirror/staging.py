"""Copy a rank's own shard from the live tensors into a slot, partly immediately, partly during the next batch.

Tensors copied *early*, in the training thread, may change as soon as `take` returns. Tensors copied *late*, in the
mirror thread, must not change until `finish` has returned. This is checked: torch counts in-place writes per tensor,
and a changed counter means a torn copy. Writes through `.data` are not counted, nor is a write still in progress when
the copy ends. Therefore the first versions, and a few later ones, are also compared with the live tensors when these
may change: a program that writes in between is found by what it writes, whether or not it was during the copy.

Static tensors are copied late, and only if they have changed (`static.py`).

With a buffer in device memory, all tensors of the device are copied into it early, and from there late
(`device_buffer.py`).

Late copies are a few calls (`copy_batch.py`), each of which releases the interpreter lock once. A loop over tensors
would have to reacquire the lock after each of them: next to a training thread busy in Python that took 400 ms instead
of 14.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from operator import attrgetter, ne
from typing import Any

import torch

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.internals.torch_internals import foreach_copy, version_counters
from lightning_ckptless.replica.layout.layout import Chunk, Layout, live_views, local_name, pieces_for, slot_views
from lightning_ckptless.replica.mirror.copy_batch import CopyBatch, LatePiece
from lightning_ckptless.replica.mirror.device_buffer import DeviceBuffer, device_of
from lightning_ckptless.replica.mirror.device_copy import DeviceCopier
from lightning_ckptless.replica.mirror.static import Pair, StaticPart


@dataclass
class PendingCopy:
    """The late part of copying a shard into a slot.

    Args:
        bulk: tensor state of the slot.
        late: the pieces that are copied late.
        halves: their copies; after the first, half of the bytes are copied.
        watched: live tensors of the sources.
        watched_names: their names.
        counts: their counts of in-place writes.
        static: the static part.
        live: the live views that the sources were taken from.
        own: the live tensors that they are views of.
        ready: CUDA event after which the sources contain the version; None in host memory.
        added: further copies, made with the second half.
    """

    bulk: torch.Tensor
    late: Sequence[LatePiece]
    halves: tuple[CopyBatch, CopyBatch]
    watched: list[torch.Tensor]
    watched_names: Collection[str]
    counts: list[int]
    static: StaticPart
    live: _Sources
    own: Sequence[torch.Tensor]
    ready: torch.cuda.Event | None = None
    added: list[Pair] = field(default_factory=list)

    def changed(self) -> str | None:
        """Name of a tensor that was modified since `take`, or is not what the sources are views of; None if none is."""
        now = version_counters(self.watched)
        if now != self.counts:
            counts = zip(self.watched_names, self.counts, now, strict=True)
            return next(name for name, before, count in counts if count != before)
        # Copies that are all early were checked before they were made.
        return self.live.misread(self.own) if self.watched else None

    def different(self) -> str | None:
        """Name of a tensor whose late copy is not what the tensor contains now; None if there is none."""
        return next((piece.name for piece in self.late if not _same_bits(piece.target, piece.source)), None)


@dataclass
class _Sources:
    """Live views of the pieces, valid as long as the tensors have the same memory, shapes and strides.

    Addresses are compared before each copy. Shapes and strides take twice as long to read, and change without the
    address only if a script assigns to `tensor.data`: they are compared after it, in the mirror thread.

    Attributes:
        is_outdated: whether the shape or strides of a tensor were found to be others.
    """

    names: Sequence[str] = ()
    addresses: list[int] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=lambda: _shapes_of(()))
    views: list[torch.Tensor] = field(default_factory=list)
    is_outdated: bool = False

    def misread(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Name of a tensor with another shape or other strides; None if there is none."""
        found = _shapes_of(tensors)
        if found == self.shapes:
            return None
        self.is_outdated = True
        differs = map(ne, zip(*found, strict=True), zip(*self.shapes, strict=True))
        return next(compress(self.names, differs))


@dataclass(frozen=True)
class _CopyPlan:
    """The copies into one slot, valid as long as neither the sources nor the early names change.

    Attributes:
        live: live views of all pieces.
        early: names of the tensors that are copied early.
        now: early copies into the slot.
        kept: copies of early tensors whose values are kept on their device, and copied into the slot late.
        buffer: where they are kept; None for a new place each time.
        late: the pieces that are copied late.
        halves: their copies; after the first, half of the bytes are copied.
        watched: index of each tensor that must not change during the late copies, by name.
        on_device: whether any tensor is on a CUDA device.
        static: the static part.
    """

    live: _Sources
    early: frozenset[str]
    now: list[Pair]
    kept: list[Pair]
    buffer: DeviceBuffer | None
    late: Sequence[LatePiece]
    halves: tuple[CopyBatch, CopyBatch]
    watched: Mapping[str, int]
    on_device: bool
    static: StaticPart

    def keep(self, bulk: torch.Tensor) -> list[Pair]:
        """Keep the values of early tensors on their device, without waiting for the device.

        Args:
            bulk: tensor state of the slot.

        Returns:
            The copies into the slot that remain.
        """
        if self.buffer is None:
            return [(target, source.clone()) for target, source in self.kept]
        self.buffer.fill([source for _, source in self.kept])
        return self.buffer.copies_into(bulk)


class Stager:
    """Fills slots with the pieces of a shard that a rank's tensors contain: of its own shard, all of them.

    Args:
        layout: layout of the state.
        rank: this rank.
        shard: index of the shard; None for the rank's own.
        buffered: whether tensors are copied into a buffer on their device before they are copied into a slot.
    """

    def __init__(self, layout: Layout, rank: int, shard: int | None = None, *, buffered: bool = False) -> None:
        self._layout = layout
        self._rank = rank
        self._shard = rank if shard is None else shard
        self._pieces = pieces_for(layout, self._shard, rank)
        self._names = [local_name(chunk, rank) for chunk in self._pieces]
        self._sources = _Sources()
        self._targets: dict[int, list[torch.Tensor]] = {}
        self._plans: dict[int, _CopyPlan] = {}
        self._device_copier: DeviceCopier | None = None
        self._is_buffered = buffered
        self._buffer: DeviceBuffer | None = None

    def take(self, bulk: torch.Tensor, tensors: Mapping[str, torch.Tensor], early: Collection[str]) -> PendingCopy:
        """Start to fill a slot, in the training thread.

        Args:
            bulk: tensor state of the slot.
            tensors: live tensors by name; only those of the own shard are used.
            early: names of the tensors to copy before this returns.

        Returns:
            The remaining copies.

        Raises:
            LayoutMismatchError: a tensor of the layout is missing or has another shape.
        """
        own, names = self._own(tensors), frozenset(early)
        live = self._live(own, tensors)
        plan = self._plan(bulk, live, names)
        if not plan.watched and live.misread(own) is not None:
            plan = self._plan(bulk, self._live(own, tensors), names)
        has_early = plan.now or plan.kept
        watched = [own[index] for index in plan.watched.values()] if has_early else own
        pending = PendingCopy(
            bulk,
            plan.late,
            plan.halves,
            watched,
            plan.watched.keys() if has_early else self._names,
            version_counters(watched),
            plan.static,
            plan.live,
            own,
        )
        foreach_copy([target for target, _ in plan.now], [source for _, source in plan.now])
        if plan.kept:
            pending.added += plan.keep(bulk)
        if plan.on_device:
            pending.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            pending.ready.record()
        return pending

    def _plan(self, bulk: torch.Tensor, live: _Sources, early: frozenset[str]) -> _CopyPlan:
        """Divide the copies into early and late ones. The plan is cached per slot: there are hundreds of tensors."""
        plan = self._plans.get(bulk.data_ptr())
        if plan is None or plan.live is not live or plan.early != early:
            pairs = list(zip(self._names, self._views_of(bulk), live.views, strict=True))
            static = self._static_part(bulk, pairs, early)
            kept = self._kept(early, live.views)
            now = [
                (target, source)
                for (name, target, source), is_kept in zip(pairs, kept, strict=True)
                if name in early and not is_kept
            ]
            late = [
                LatePiece(chunk, *pair)
                for index, (chunk, pair) in enumerate(zip(self._pieces, pairs, strict=True))
                if pair[0] not in early and index not in static.compared
            ]
            middle = _middle([piece.source for piece in late])
            plan = self._plans[bulk.data_ptr()] = _CopyPlan(
                live=live,
                early=early,
                now=now,
                kept=[*compress((pair[1:] for pair in pairs), kept)],
                buffer=self._buffer_of([*compress(self._pieces, kept)], live.views) if any(kept) else None,
                late=late,
                halves=(CopyBatch(bulk, late[:middle]), CopyBatch(bulk, late[middle:])),
                watched={name: index for index, name in enumerate(self._names) if name not in early},
                on_device=any(source.is_cuda for source in live.views),
                static=static,
            )
        return plan

    def _static_part(
        self, bulk: torch.Tensor, pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor]], early: frozenset[str]
    ) -> StaticPart:
        chunks = [chunk for chunk in self._pieces if chunk.static]
        first = pairs[: len(chunks)]
        return StaticPart(
            chunks,
            bulk[: self._layout.static_bytes(self._shard)],
            [(target, source) for _, target, source in first],
            [name not in early for name, _, _ in first],
        )

    def _kept(self, early: frozenset[str], views: Sequence[torch.Tensor]) -> list[bool]:
        """Whether each piece is copied early, and kept on its device."""
        device = device_of(views)
        return [
            name in early and (view.is_cuda or (self._is_buffered and view.device == device))
            for name, view in zip(self._names, views, strict=True)
        ]

    def _buffer_of(self, chunks: Sequence[Chunk], views: Sequence[torch.Tensor]) -> DeviceBuffer | None:
        if not self._is_buffered:
            return None
        if self._buffer is None or self._buffer.chunks != tuple(chunks):
            self._buffer = DeviceBuffer(chunks, device_of(views))
        return self._buffer

    def finish(self, pending: PendingCopy, half_done: Callable[[], None] | None = None) -> int:
        """Fill the rest of a slot, in any thread.

        Args:
            pending: result of `take`.
            half_done: called after half of the data is copied.

        Returns:
            Number of bytes that the slot already contained and that were not written.
        """
        outdated = pending.static.outdated()
        pending.added += outdated
        first, second = pending.halves
        self._copy(pending, first, ())
        if half_done is not None:
            half_done()
        self._copy(pending, second, pending.added)
        return pending.static.compared_bytes - sum(target.nbytes for target, _ in outdated)

    def close(self) -> None:
        """Unregister the slots, which are about to be unmapped."""
        if self._device_copier is not None:
            self._device_copier.close()

    def _copy(self, pending: PendingCopy, batch: CopyBatch, added: Sequence[Pair]) -> None:
        batch.concatenate()
        targets = [*batch.targets, *(target for target, _ in added)]
        sources = [*batch.sources, *(source for _, source in added)]
        if pending.ready is None:
            foreach_copy(targets, sources)
            return
        pairs = list(zip(targets, sources, strict=True))
        host = [pair for pair in pairs if not pair[1].is_cuda]
        foreach_copy([target for target, _ in host], [source for _, source in host])
        device = [pair for pair in pairs if pair[1].is_cuda]
        if device:
            if self._device_copier is None:
                self._device_copier = DeviceCopier(device[0][1].device)
            self._device_copier.copy(
                pending.bulk, [target for target, _ in device], [source for _, source in device], pending.ready
            )

    def _own(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        try:
            return list(map(tensors.__getitem__, self._names))
        except KeyError as error:
            raise LayoutMismatchError(f"rank {self._rank}: tensor {error} of the layout is missing") from error

    def _live(self, own: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> _Sources:
        known, addresses = self._sources, list(map(torch.Tensor.data_ptr, own))
        if known.is_outdated or addresses != known.addresses:
            held = self._layout.held_by(self._rank)
            for name, tensor in zip(self._names, own, strict=True):
                if (str(tensor.dtype), tuple(tensor.shape)) != (held[name].dtype, held[name].box.sizes):
                    raise LayoutMismatchError(
                        f"rank {self._rank}: {name} is {tensor.dtype}{list(tensor.shape)}, expected {held[name]}: the "
                        "layout of the state must not change during training"
                    )
            views = live_views(self._layout, self._shard, self._rank, tensors)
            self._sources = _Sources(self._names, addresses, _shapes_of(own), views)
        return self._sources

    def _views_of(self, bulk: torch.Tensor) -> list[torch.Tensor]:
        at = bulk.data_ptr()
        if at not in self._targets:
            self._targets[at] = slot_views(self._layout, self._shard, bulk, rank=self._rank)
        return self._targets[at]


def _shapes_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """The shapes and strides, in two calls instead of two per tensor: there are hundreds of tensors, in every step."""
    return [list(map(attrgetter("shape"), tensors)), list(map(torch.Tensor.stride, tensors))]


def _middle(tensors: list[torch.Tensor]) -> int:
    """The index at which half of the bytes are copied."""
    sums = list(accumulate(tensor.nbytes for tensor in tensors))
    return next((index for index, total in enumerate(sums, 1) if 2 * total >= sums[-1]), 0)


def _same_bits(copy: torch.Tensor, live: torch.Tensor) -> bool:
    there = live.detach().to(copy.device).reshape(-1)
    return torch.equal(copy.reshape(-1).view(torch.uint8), there.view(torch.uint8))
