"""The order of a loader's samples: what its samplers draw it from, and an iterator over it that can skip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.samplers import sampler_inside
from lightning_ckptless.trainer.state.plain_values import heavy_attributes, plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng, owned_generators, set_owned_generators

HEAVY_BYTES = 1_000_000
"""A sampler's attribute beyond this is taken along only where it has changed since the sampler was made."""


MOST_CHANGES = 4096
"""Of a sampler's numbers within one epoch that are remembered."""

Switched = dict[int, list[dict[str, Any]]]
"""By the number of a batch in its epoch: the numbers and switches of the sampler and those inside it, where new."""


class OrderTracker(Protocol):
    """Receives the order of an epoch when it is drawn.

    Attributes:
        switched: what has changed between the batches of this order.
    """

    switched: Switched

    def on_order_made(self, sampler: Any, order: Order) -> None:
        """Called when an iterator is about to be made of the sampler."""

    def on_order_start(self, sampler: Any) -> int:
        """Called when the first index is about to be drawn; returns how many index batches to skip."""
        ...


class WatchedSampler:
    """A loader's sampler, watched at the moment its order is drawn."""

    def __init__(self, sampler: Any, tracker: OrderTracker) -> None:
        self.sampler, self.tracker = sampler, tracker

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __iter__(self) -> Order:
        return Order(self.sampler, self.tracker)


class Order:
    """A sampler's iterator. Samplers draw their order when it is made, or (generators) at the first index.

    A batch sampler reads its size at every batch: numbers and switches that change between two of them are remembered
    with the number of the batch, and set again when these batches are skipped.
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
        """Come to the first index to be used, now and not when it is asked for."""
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
    """The numbers and switches that a sampler and those inside it hold."""
    return [
        {name: value for name, value in getattr(part, "__dict__", {}).items() if type(value) in (int, float, bool)}
        for part in sampler_parts(sampler)
    ]


def _set_switches(sampler: Any, switches: list[dict[str, Any]]) -> None:
    for part, values in zip(sampler_parts(sampler), switches, strict=True):
        set_plain_attributes(part, values)


def dump_sampler(sampler: Any) -> Packed:
    """The global generators, and what a sampler and those inside it hold, before an order is drawn."""
    parts = [
        (plain_attributes(part, leave=heavy_attributes(part, HEAVY_BYTES)), owned_generators(part))
        for part in sampler_parts(sampler)
    ]
    return pack((capture_rng(), parts))


def apply_sampler(sampler: Any, saved: Packed) -> None:
    """Put back what `dump_sampler` took: the same order is drawn again."""
    rng, attributes = unpack(saved)
    apply_rng(rng)
    for part, (plain, owned) in zip(sampler_parts(sampler), attributes, strict=True):
        set_plain_attributes(part, plain)
        set_owned_generators(part, owned)


def sampler_parts(sampler: Any) -> Iterator[Any]:
    """A sampler and those inside it."""
    seen = 0
    while sampler is not None and seen < 8:
        yield sampler
        inner = getattr(sampler, "sampler", None)
        sampler, seen = sampler_inside(sampler) if inner is None else inner, seen + 1
