"""Replays the sample order of a loader: captures what its samplers draw it from, and skips along it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.samplers import sampler_inside
from lightning_ckptless.trainer.state.plain_values import heavy_attributes, plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng, owned_generators, set_owned_generators

HEAVY_SAMPLER_BYTES = 1_000_000
"""A larger sampler attribute is captured only if it has changed since the sampler was created."""


MOST_CHANGES = 4096
"""Largest number of changes to a sampler's numbers recorded within one epoch."""

Switched = dict[int, list[dict[str, Any]]]
"""By batch index in the epoch: the numbers and booleans of the sampler and its inner samplers, where they changed."""


class OrderTracker(Protocol):
    """Is notified when the order of an epoch is drawn.

    Attributes:
        switched: changes between the batches of this order.
    """

    switched: Switched

    def on_order_made(self, sampler: Any, order: Order) -> None:
        """Called just before an iterator over the sampler is created."""

    def on_order_start(self, sampler: Any) -> int:
        """Called just before the first index is drawn; returns the number of index batches to skip."""
        ...


class WatchedSampler:
    """A loader's sampler that notifies a tracker when its order is drawn."""

    def __init__(self, sampler: Any, tracker: OrderTracker) -> None:
        self.sampler, self.tracker = sampler, tracker

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __iter__(self) -> Order:
        return Order(self.sampler, self.tracker)


class Order:
    """A sampler's iterator. Samplers draw their order when it is created or, if generators, at the first index.

    A batch sampler may read its batch size for every batch. Numbers and booleans that change between two batches are
    recorded with the batch index, and applied again when these batches are skipped.
    """

    def __init__(self, sampler: Any, tracker: OrderTracker) -> None:
        self.sampler, self.tracker, self.started = sampler, tracker, False
        self._drawn = 0
        tracker.on_order_made(sampler, self)
        self.indices = iter(sampler)

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> Any:
        self.start()
        return self._draw()

    def start(self) -> None:
        """Skip to the first index to use now, instead of on the first request."""
        if not self.started:
            self.started = True
            skipped = self.tracker.on_order_start(self.sampler)
            self._switches = _switches(self.sampler)
            for _ in range(skipped):
                with suppress(StopIteration):
                    self._draw()

    def _draw(self) -> Any:
        changes = self.tracker.switched
        if self._drawn in changes:
            _set_switches(self.sampler, changes[self._drawn])
            self._switches = _switches(self.sampler)
        elif (switches := _switches(self.sampler)) != self._switches and len(changes) < MOST_CHANGES:
            self._switches = changes[self._drawn] = switches
        self._drawn += 1
        return next(self.indices)


def _switches(sampler: Any) -> list[dict[str, Any]]:
    """Return the numbers and booleans that a sampler and its inner samplers hold."""
    return [
        {name: value for name, value in getattr(part, "__dict__", {}).items() if type(value) in (int, float, bool)}
        for part in sampler_parts(sampler)
    ]


def _set_switches(sampler: Any, switches: list[dict[str, Any]]) -> None:
    for part, values in zip(sampler_parts(sampler), switches, strict=True):
        set_plain_attributes(part, values)


def dump_sampler(sampler: Any) -> Packed:
    """Capture the global generators and the state of a sampler and its inner samplers before an order is drawn."""
    parts = [
        (plain_attributes(part, leave=heavy_attributes(part, HEAVY_SAMPLER_BYTES)), owned_generators(part))
        for part in sampler_parts(sampler)
    ]
    return pack((capture_rng(), parts))


def apply_sampler(sampler: Any, saved: Packed) -> None:
    """Restore what `dump_sampler` captured, so that the same order is drawn again."""
    rng, attributes = unpack(saved)
    apply_rng(rng)
    for part, (plain, owned) in zip(sampler_parts(sampler), attributes, strict=True):
        set_plain_attributes(part, plain)
        set_owned_generators(part, owned)


def sampler_parts(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and its inner samplers."""
    seen = 0
    while sampler is not None and seen < 8:
        yield sampler
        inner = getattr(sampler, "sampler", None)
        sampler, seen = sampler_inside(sampler) if inner is None else inner, seen + 1
