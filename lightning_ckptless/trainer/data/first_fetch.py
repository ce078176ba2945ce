"""The first fetch after a restart from a dataloader that restores its own position (`state_dict`).

If `__iter__` of the loader or its dataset is a generator function, it runs up to its first `yield` only when the first
batch is fetched. Until then a restored loader has not used its restored position, and the random numbers it draws on
the way come before the restored generator states. So this fetch starts with the generator states of the original first
fetch, and leaves generators and attributes as they would be without a restart.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.trainer.data.dataset_generators import DatasetGenerators
from lightning_ckptless.trainer.state.plain_values import plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng

log = logging.getLogger(__name__)


@dataclass
class Fetches:
    """Observations about a loader's fetches in one iteration.

    Args:
        at_first: generator states before the first fetch; None before it happens.
        draws: whether later fetches draw random numbers in this process; None if unknown.
        changes: plain attributes that later fetches change, for a loader with a generator function.
        attributes: its current plain attributes.
    """

    at_first: Packed | None = None
    draws: bool | None = None
    changes: frozenset[str] = frozenset()
    attributes: dict[str, Any] = field(default_factory=dict)


class FirstFetch:
    """Observes the fetches of a loader, and performs the first one after a restart.

    Args:
        loader: returns the loader while it exists.
        generators: the generators that its dataset draws from.
    """

    def __init__(self, loader: Callable[[], Any], generators: DatasetGenerators) -> None:
        self._loader = loader
        self._of_dataset = generators
        self._known = Fetches()
        self._restored: Fetches | None = None
        self._is_lazy = False
        self._continue_at: Packed | None = None
        self._is_told_apart = False

    def position(self) -> Fetches:
        """Return what a restarted loader needs to know. It refers to live objects."""
        return Fetches(self._known.at_first, self._known.draws, self._known.changes, self._attributes())

    def begin(self) -> None:
        """Prepare for a new iteration."""
        if self._restored is not None:
            # Nothing was fetched since the restart: the restored position belongs to the previous iteration.
            set_plain_attributes(self._loader(), copy.deepcopy(self._restored.attributes))
        self._known, self._restored, self._is_lazy = Fetches(), None, False

    def restore(self, state: Any, saved: Fetches, batches: int) -> None:
        """Restore the loader before it starts an iteration.

        Args:
            state: its `state_dict()`.
            saved: observations about its fetches.
            batches: number of batches fetched in the iteration.
        """
        self._known = Fetches(saved.at_first, saved.draws, saved.changes)
        self._restored, self._is_lazy = saved if batches else None, False
        if batches or not saved.attributes:
            self._loader().load_state_dict(state)
        else:
            # Before its first batch, the state of such a loader is that of its previous iteration.
            set_plain_attributes(self._loader(), copy.deepcopy(saved.attributes))

    def watch(self, iterator: Any) -> None:
        """Observe a newly created iterator."""
        self._is_lazy = inspect.isgenerator(iterator)

    def fetch(self, inner: Callable[[], Any], *, is_first: bool) -> Any:
        """Fetch a batch.

        Args:
            inner: the iterator's own fetch.
            is_first: whether this is the first fetch of the iteration.
        """
        if self._restored is not None:
            restored, self._restored = self._restored, None
            return self._fetch_restored(inner, restored)
        before, attributes = self._generators(), pack(self._attributes())
        data = inner()
        has_drawn = self._generators() != before
        if is_first:
            # What the first fetch draws may belong to the batch or to the loader's setup.
            self._known.at_first, self._known.draws = before, None if has_drawn else False
        else:
            self._known.draws = bool(self._known.draws) or has_drawn
            self._known.changes |= _changed(unpack(attributes), self._attributes())
        return data

    def _fetch_restored(self, inner: Callable[[], Any], restored: Fetches) -> Any:
        continue_at = self._generators()
        if restored.at_first is None or (not self._is_lazy and restored.draws is not False):
            if restored.draws is None:
                self._warn()
            return inner()
        self._set_generators(restored.at_first)
        if restored.draws is False:
            data = inner()
            self._set_generators(continue_at)
        else:
            data = self._fetch_and_tell_apart(inner, continue_at)
        kept = {name: value for name, value in restored.attributes.items() if name not in restored.changes}
        set_plain_attributes(self._loader(), copy.deepcopy(kept))
        return data

    def _fetch_and_tell_apart(self, inner: Callable[[], Any], continue_at: Packed) -> Any:
        """Fetch with the generators of the original first fetch for setup, and the restored ones for the batch.

        The creation of torch's own iterator by the loader marks the boundary between the two.
        """
        self._continue_at, self._is_told_apart = continue_at, False
        with torch_internals.watching_inner_iterators(self._loader(), self._continuing):
            data = inner()
        self._continue_at = None
        if not self._is_told_apart:
            self._set_generators(continue_at)
            self._warn()
        return data

    def _continuing(self, fetch: Callable[[], Any]) -> Callable[[], Any]:
        def fetched() -> Any:
            if self._continue_at is not None:
                self._is_told_apart = True
                self._set_generators(self._continue_at)
            return fetch()

        return fetched

    def _warn(self) -> None:
        log.warning(
            "ckptless: a training dataloader (%s) draws random numbers in the training process when an iteration "
            "starts, and perhaps for each batch: the first batch after this fault may differ from a run without it. "
            "Draw them in dataloader workers (num_workers > 0), or before __iter__ returns",
            type(self._loader()).__name__,
        )

    def _attributes(self) -> dict[str, Any]:
        return plain_attributes(self._loader()) if self._is_lazy else {}

    def _generators(self) -> Packed:
        return pack((capture_rng(), self._of_dataset.capture()))

    def _set_generators(self, saved: Packed) -> None:
        rng, owned = unpack(saved)
        apply_rng(rng)
        self._of_dataset.apply(owned)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> frozenset[str]:
    return frozenset(name for name in before.keys() | after.keys() if _packed(before, name) != _packed(after, name))


def _packed(attributes: dict[str, Any], name: str) -> bytes:
    return pack(attributes[name]) if name in attributes else b""
