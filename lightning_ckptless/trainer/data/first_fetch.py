"""The first fetch after a restart, of a dataloader that restores its own position (`state_dict`).

A generator function as `__iter__`, or as the `__iter__` of its dataset, runs up to its first `yield` only when the
first batch is fetched. Until then a restored loader has not used the position that it was given, and what it draws on
the way there precedes the restored generators. So that fetch begins with the generators of the loader's first fetch
ever, and leaves generators and attributes as they would be without a restart.
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
from lightning_ckptless.trainer.state.plain_values import plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng, owned_generators, set_owned_generators

log = logging.getLogger(__name__)


@dataclass
class Fetches:
    """What is known of a loader's fetches in one iteration.

    Args:
        at_first: generators before the first one; None before that.
        draws: whether one after the first draws random numbers in this process; None where that is not known.
        changes: plain attributes of a loader with a generator function that one after the first changes.
        attributes: its plain attributes now.
    """

    at_first: Packed | None = None
    draws: bool | None = None
    changes: frozenset[str] = frozenset()
    attributes: dict[str, Any] = field(default_factory=dict)


class FirstFetch:
    """Watches the fetches of a loader, and makes the first one after a restart.

    Args:
        loader: returns the loader, as long as there is one.
        dataset: of the loader.
    """

    def __init__(self, loader: Callable[[], Any], dataset: Any) -> None:
        self._loader = loader
        self._dataset = dataset
        self._known = Fetches()
        self._restored: Fetches | None = None
        self._is_lazy = False
        self._continue_at: Packed | None = None
        self._is_told_apart = False

    def position(self) -> Fetches:
        """What a restarted loader has to know; it refers to live objects."""
        return Fetches(self._known.at_first, self._known.draws, self._known.changes, self._attributes())

    def begin(self) -> None:
        """An iteration is about to begin."""
        if self._restored is not None:
            # Nothing was fetched since the restart: the restored position is of the iteration that has ended.
            set_plain_attributes(self._loader(), copy.deepcopy(self._restored.attributes))
        self._known, self._restored, self._is_lazy = Fetches(), None, False

    def restore(self, state: Any, saved: Fetches, batches: int) -> None:
        """Restore the loader, which is about to begin an iteration.

        Args:
            state: its `state_dict()`.
            saved: what was known of its fetches.
            batches: how many were fetched in the iteration.
        """
        self._known = Fetches(saved.at_first, saved.draws, saved.changes)
        self._restored, self._is_lazy = saved if batches else None, False
        if batches or not saved.attributes:
            self._loader().load_state_dict(state)
        else:
            # The state that such a loader gives before its first batch is that of its last iteration.
            set_plain_attributes(self._loader(), copy.deepcopy(saved.attributes))

    def watch(self, iterator: Any) -> None:
        """The iterator was made."""
        self._is_lazy = inspect.isgenerator(iterator)

    def fetch(self, inner: Callable[[], Any], *, is_first: bool) -> Any:
        """Fetch a batch.

        Args:
            inner: the iterator's own fetch.
            is_first: whether it is the first one of the iteration.
        """
        if self._restored is not None:
            restored, self._restored = self._restored, None
            return self._fetch_restored(inner, restored)
        before, attributes = self._generators(), pack(self._attributes())
        data = inner()
        has_drawn = self._generators() != before
        if is_first:
            # What the first one draws may be what every one draws, or what the loader begins with.
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
        """Fetch with the generators of the first fetch up to the batch itself, which begins with the restored ones.

        The two are told apart by the iterator of torch's that the loader makes meanwhile.
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
            "ckptless: a training dataloader (%s) draws random numbers in the training process when it begins, and "
            "perhaps with each batch: those of the first batch after this fault may differ from a run without it. "
            "Draw them in dataloader workers (num_workers > 0), or before __iter__ returns",
            type(self._loader()).__name__,
        )

    def _attributes(self) -> dict[str, Any]:
        return plain_attributes(self._loader()) if self._is_lazy else {}

    def _generators(self) -> Packed:
        return pack((capture_rng(), owned_generators(self._dataset)))

    def _set_generators(self, saved: Packed) -> None:
        rng, owned = unpack(saved)
        apply_rng(rng)
        set_owned_generators(self._dataset, owned)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> frozenset[str]:
    return frozenset(name for name in before.keys() | after.keys() if _packed(before, name) != _packed(after, name))


def _packed(attributes: dict[str, Any], name: str) -> bytes:
    return pack(attributes[name]) if name in attributes else b""
