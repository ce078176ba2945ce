"""Copying a rank's own shard out of the live tensors into a slot, partly now, partly beside the next batch.

What is copied *early*, in the training thread, may change as soon as `take` returns. What is copied *late*, in the
mirror thread, must not change until `finish` has returned. That is watched: torch counts in-place writes per tensor,
and a counter that moved means a torn copy. (A write through `.data` is not counted, nor one still under way when the
copy ends, so the count finds mistakes; the promise itself is the caller's.)

Tensors that seem to change seldom are copied late only where they have changed (`still.py`).

All late copies are one call, which gives up the interpreter lock once. A loop over tensors has to win the lock back
after each, and beside a training thread busy in Python that took 400 ms for what takes 14.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.internals.torch_internals import foreach_copy, version_counter
from lightning_ckptless.replica.layout.layout import Layout, live_views, local_name, slot_views
from lightning_ckptless.replica.mirror.device_copy import DeviceCopier
from lightning_ckptless.replica.mirror.static import Pair, StaticPart


@dataclass
class Load:
    """A shard on its way into a slot.

    Args:
        bulk: the slot's tensor part.
        targets: views of it that are still to be filled.
        sources: the live views they are filled from.
        watched: live tensors behind the sources, with their counts of in-place writes.
        middle: index that halves the bytes.
        still: what seems to change seldom.
        ready: marks the point in the device's stream at which the sources hold the version; None in host memory.
    """

    bulk: torch.Tensor
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    watched: list[tuple[str, torch.Tensor, int]]
    middle: int
    still: StaticPart
    ready: torch.cuda.Event | None = None

    def changed(self) -> str | None:
        """Name of a tensor that was written to since it was taken; None when all are as they were."""
        return next((name for name, tensor, count in self.watched if version_counter(tensor) != count), None)


@dataclass
class _Sources:
    """Live views of the own shard, for as long as the tensors stay where they are."""

    identity: list[tuple[int, torch.Size, tuple[int, ...]]] = field(default_factory=list)
    views: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Cut:
    """What is copied into one slot early and what late, for as long as neither the sources nor the names change."""

    live: _Sources
    early: frozenset[str]
    now: list[Pair]
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    watched: list[str]
    middle: int
    on_device: bool
    still: StaticPart


class Stager:
    """Fills slots with a rank's own shard.

    Args:
        layout: how the state is cut.
        rank: this rank, whose shard it is.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout = layout
        self._rank = rank
        self._names = [local_name(chunk, rank) for chunk in layout.of(rank)]
        self._sources = _Sources()
        self._targets: dict[int, list[torch.Tensor]] = {}
        self._cuts: dict[int, _Cut] = {}
        self._device_copier: DeviceCopier | None = None

    def take(self, bulk: torch.Tensor, tensors: Mapping[str, torch.Tensor], early: Collection[str]) -> Load:
        """Begin to fill a slot, in the training thread.

        Args:
            bulk: the slot's tensor part.
            tensors: live tensors by name; those of the own shard are looked at.
            early: names to copy before this returns.

        Returns:
            What is left to copy.

        Raises:
            LayoutMismatchError: a tensor of the layout is missing or has another shape.
        """
        cut = self._cut(bulk, self._live(tensors), frozenset(early))
        load = Load(
            bulk,
            list(cut.targets),
            list(cut.sources),
            [(name, tensor := tensors[name], version_counter(tensor)) for name in cut.watched],
            cut.middle,
            cut.still,
        )
        self._copy_now(cut.now, load)
        if cut.on_device:
            load.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            load.ready.record()
        return load

    def _cut(self, bulk: torch.Tensor, live: _Sources, early: frozenset[str]) -> _Cut:
        """Divide the copies into early and late ones: once per slot, since hundreds of tensors are looked at."""
        cut = self._cuts.get(bulk.data_ptr())
        if cut is None or cut.live is not live or cut.early != early:
            pairs = list(zip(self._names, self._views_of(bulk), live.views, strict=True))
            still = self._still_part(bulk, pairs, early)
            late = [
                (target, source)
                for place, (name, target, source) in enumerate(pairs)
                if name not in early and place not in still.compared
            ]
            cut = self._cuts[bulk.data_ptr()] = _Cut(
                live=live,
                early=early,
                now=[(target, source) for name, target, source in pairs if name in early],
                targets=[target for target, _ in late],
                sources=[source for _, source in late],
                watched=[name for name in dict.fromkeys(self._names) if name not in early],
                middle=_middle([source for _, source in late]),
                on_device=any(source.is_cuda for source in live.views),
                still=still,
            )
        return cut

    def _still_part(
        self, bulk: torch.Tensor, pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor]], early: frozenset[str]
    ) -> StaticPart:
        chunks = [chunk for chunk in self._layout.of(self._rank) if chunk.still]
        first = pairs[: len(chunks)]
        return StaticPart(
            chunks, bulk, [(target, source) for _, target, source in first], [name not in early for name, _, _ in first]
        )

    def _copy_now(self, pairs: list[Pair], load: Load) -> None:
        host = [(target, source) for target, source in pairs if not source.is_cuda]
        with torch.no_grad():
            foreach_copy([target for target, _ in host], [source for _, source in host])
        for target, source in pairs:
            if source.is_cuda:
                # A copy on the device keeps the value without a wait for the device.
                load.targets.append(target)
                load.sources.append(source.clone())

    def finish(self, load: Load, half_done: Callable[[], None] | None = None) -> int:
        """Fill the rest of a slot; any thread.

        Args:
            load: what `take` returned.
            half_done: called in the middle.

        Returns:
            Bytes of the slot that hold the version already, and were not written.
        """
        outdated = load.still.outdated()
        load.targets += [target for target, _ in outdated]
        load.sources += [source for _, source in outdated]
        middle = load.middle if half_done is not None else len(load.sources)
        self._copy(load, slice(0, middle))
        if half_done is not None:
            half_done()
            self._copy(load, slice(middle, None))
        return load.still.compared_bytes - sum(target.nbytes for target, _ in outdated)

    def close(self) -> None:
        """Let go of the slots: they are about to be unmapped."""
        if self._device_copier is not None:
            self._device_copier.close()

    def _copy(self, load: Load, part: slice) -> None:
        pairs = list(zip(load.targets[part], load.sources[part], strict=True))
        host = [pair for pair in pairs if load.ready is None or not pair[1].is_cuda]
        with torch.no_grad():
            foreach_copy([target for target, _ in host], [source for _, source in host])
        device = [pair for pair in pairs if pair[1].is_cuda]
        if device and load.ready is not None:
            if self._device_copier is None:
                self._device_copier = DeviceCopier(device[0][1].device)
            self._device_copier.copy(
                load.bulk, [target for target, _ in device], [source for _, source in device], load.ready
            )

    def _live(self, tensors: Mapping[str, torch.Tensor]) -> _Sources:
        try:
            own = [tensors[name] for name in self._names]
        except KeyError as error:
            raise LayoutMismatchError(f"rank {self._rank}: tensor {error} of the layout is missing") from error
        identity = [(t.data_ptr(), t.shape, t.stride()) for t in own]
        if identity != self._sources.identity:
            held = self._layout.held_by(self._rank)
            for name, tensor in zip(self._names, own, strict=True):
                if (str(tensor.dtype), tuple(tensor.shape)) != (held[name].dtype, held[name].box.sizes):
                    raise LayoutMismatchError(
                        f"rank {self._rank}: {name} is {tensor.dtype}{list(tensor.shape)} here, expected {held[name]}: "
                        "the layout of the state must stay as it was when training began"
                    )
            self._sources = _Sources(identity, live_views(self._layout, self._rank, self._rank, tensors))
        return self._sources

    def _views_of(self, bulk: torch.Tensor) -> list[torch.Tensor]:
        at = bulk.data_ptr()
        if at not in self._targets:
            self._targets[at] = slot_views(self._layout, self._rank, bulk)
        return self._targets[at]


def _middle(tensors: list[torch.Tensor]) -> int:
    """Index that halves the bytes."""
    sums = list(accumulate(tensor.nbytes for tensor in tensors))
    return next((index for index, total in enumerate(sums, 1) if 2 * total >= sums[-1]), 0)
