"""One dataloader at an exact position.

A loader made resumable remembers, at each start, the random numbers it is about to draw its order from, and counts
what it has handed out. Put back, it draws the same order again and skips what was handed out without asking the
dataset. Where that is not possible (an iterable dataset) the batches are fetched again and dropped.

Random numbers drawn in worker processes: every batch of a map-style dataset carries home the state of its worker's
generators; on a restart each worker gets its own state back, and the first batch is prepared by the worker whose turn
it is. So augmentation in workers goes on exactly, in persistent workers too.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from lightning_ckptless import torch_internals
from lightning_ckptless.trainer.plain import plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.rng import (
    apply_rng,
    capture_rng,
    owned_generators,
    set_owned_generators,
)

TRACKER = "_ckptless_tracker"


@dataclass(frozen=True)
class LoaderPosition:
    """Where one loader is. Bytes are pickles that stay the same for a whole epoch.

    Args:
        yielded: batches handed out since the start of the iteration.
        at_start: generators just before the iterator was made (it draws the seed of its workers).
        at_sampler: generators and the sampler's attributes just before the order was drawn; None before that.
        at_fetch: generators before the last batch was fetched; None where no batch can lie prefetched.
        workers: per worker its generators after its last batch that was handed out.
        own_state: `state_dict()` of a loader that can say its own position.
        dataset: state of the generators that the dataset owns.
    """

    yielded: int
    at_start: bytes
    at_sampler: bytes | None
    at_fetch: bytes | None
    workers: dict[int, bytes]
    own_state: dict[str, Any] | None
    dataset: dict[str, Any]


class _Stamped:
    """A batch with the generators of the worker that made it."""

    def __init__(self, data: Any, worker: int, generators: bytes) -> None:
        self.data, self.worker, self.generators = data, worker, generators

    def pin_memory(self) -> _Stamped:
        """Called by the loader's pinning thread."""
        return _Stamped(torch_internals.pin(self.data), self.worker, self.generators)


class _StampingCollate:
    """The user's collate function, with a stamp on what it returns in a worker."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        data = self.collate(samples)
        if (worker := get_worker_info()) is None:
            return data
        generators = pickle.dumps((capture_rng(), owned_generators(worker.dataset)))
        return _Stamped(data, worker.id, generators)


class _WorkerStart:
    """The user's `worker_init_fn`, then the generators that the worker had."""

    def __init__(self, init: Callable[[int], None] | None, generators: dict[int, bytes]) -> None:
        self.init, self.generators = init, generators

    def __call__(self, worker_id: int) -> None:
        if self.init is not None:
            self.init(worker_id)
        if (saved := self.generators.get(worker_id)) is not None:
            worker = get_worker_info()
            assert worker is not None
            rng, owned = pickle.loads(saved)
            apply_rng(rng)
            set_owned_generators(worker.dataset, owned)


class _WatchedSampler:
    """A loader's sampler, watched at the moment its order is drawn."""

    def __init__(self, sampler: Any, tracker: LoaderTracker) -> None:
        self.sampler, self.tracker = sampler, tracker

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[Any]:
        skip = self.tracker.on_sampler_start(self.sampler)
        indices = iter(self.sampler)
        for _ in range(skip):
            next(indices, None)
        yield from indices


class LoaderTracker:
    """What a resumable loader remembers about its current iteration."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.states_itself = callable(getattr(loader, "state_dict", None))
        self.by_index = torch_internals.is_map_style(loader) and not self.states_itself
        self.resume: LoaderPosition | None = None
        self.iterator: Any = None
        self.at_start = b""
        self.at_sampler: bytes | None = None
        self.at_fetch: bytes | None = None
        self.state_before_fetch: dict[str, Any] | None = None
        self.workers: dict[int, bytes] = {}
        self.rotation = 0
        self._sampler_resume: LoaderPosition | None = None

    # ------------------------------------------------------------------ remember

    def position(self, buffered: int) -> LoaderPosition | None:
        """Where the loader is, not counting batches that lie prefetched behind it."""
        if self.iterator is None:
            return None
        own_state = None
        if self.states_itself:
            own_state = self.state_before_fetch if buffered else self.loader.state_dict()  # type: ignore[attr-defined]
        return LoaderPosition(
            yielded=torch_internals.batches_yielded(self.iterator) - buffered,
            at_start=self.at_start,
            at_sampler=self.at_sampler,
            at_fetch=self.at_fetch if buffered else None,
            workers=dict(self.workers),
            own_state=own_state,
            dataset=owned_generators(self.loader.dataset),
        )

    def on_sampler_start(self, sampler: Any) -> int:
        """Called when the sampler is about to draw its order; returns how many index batches to skip."""
        resume, self._sampler_resume = self._sampler_resume, None
        parts = list(_sampler_parts(sampler))
        if resume is not None and resume.at_sampler is not None:
            rng, attributes = pickle.loads(resume.at_sampler)
            apply_rng(rng)
            for part, (plain, owned) in zip(parts, attributes, strict=True):
                set_plain_attributes(part, plain)
                set_owned_generators(part, owned)
        self.at_sampler = pickle.dumps((capture_rng(), [(plain_attributes(p), owned_generators(p)) for p in parts]))
        return resume.yielded if resume is not None and self.by_index else 0

    def fetch(self, inner: Callable[[], Any]) -> Callable[[], Any]:
        """The iterator's fetch, with the stamp taken off and the generators before it kept."""

        def fetched() -> Any:
            if self._may_prefetch():
                self.at_fetch = pickle.dumps((capture_rng(), owned_generators(self.loader.dataset)))
                if self.states_itself:
                    self.state_before_fetch = self.loader.state_dict()  # type: ignore[attr-defined]
            data = inner()
            if isinstance(data, _Stamped):
                self.workers[data.worker] = data.generators
                return data.data
            return data

        return fetched

    def _may_prefetch(self) -> bool:
        try:
            len(self.loader)
        except TypeError:
            return True
        return False

    # ------------------------------------------------------------------ start

    def start(self, make: Callable[[], Any]) -> Any:
        """Make the loader's iterator, at the position to resume if there is one."""
        resume, self.resume = self.resume, None
        fresh = not (self.loader.persistent_workers and self.iterator is not None)
        if not self.loader.persistent_workers:
            self.workers = {}
        self.at_sampler = None
        if resume is None:
            if fresh:
                self.at_start = pickle.dumps(capture_rng())
            return self._watch(make())
        return self._restart(resume, make)

    def _restart(self, resume: LoaderPosition, make: Callable[[], Any]) -> Any:
        loader, user_init = self.loader, self.loader.worker_init_fn
        self.at_start, self.workers = resume.at_start, dict(resume.workers)
        if resume.at_start:
            apply_rng(pickle.loads(resume.at_start))
        if resume.own_state is not None:
            loader.load_state_dict(resume.own_state)  # type: ignore[attr-defined]
        elif resume.at_sampler is not None:
            self._sampler_resume = resume
        loader.worker_init_fn = _WorkerStart(user_init, resume.workers) if resume.workers else user_init
        self.rotation = resume.yielded % loader.num_workers if loader.num_workers and self.by_index else 0
        try:
            iterator = self._watch(make())
        finally:
            loader.worker_init_fn, self.rotation = user_init, 0
        self._skip(iterator, resume)
        set_owned_generators(loader.dataset, resume.dataset)
        return iterator

    def _skip(self, iterator: Any, resume: LoaderPosition) -> None:
        if resume.own_state is not None:
            return
        if self.by_index:
            if self.loader.num_workers == 0 and resume.at_sampler is not None:
                torch_internals.start_sampler(iterator)
            torch_internals.set_batches_yielded(iterator, resume.yielded)
        else:
            for _ in range(resume.yielded):
                next(iterator)

    def _watch(self, iterator: Any) -> Any:
        if iterator is not self.iterator:
            torch_internals.wrap_fetch(iterator, self.fetch)
        self.iterator = iterator
        return iterator

    def before_buffer(self, position: LoaderPosition) -> None:
        """Put the generators to where they were before a prefetched batch was made."""
        if position.at_fetch is not None:
            rng, owned = pickle.loads(position.at_fetch)
            apply_rng(rng)
            set_owned_generators(self.loader.dataset, owned)


def _sampler_parts(sampler: Any) -> Iterator[Any]:
    seen = 0
    while sampler is not None and seen < 8:
        yield sampler
        sampler, seen = getattr(sampler, "sampler", None), seen + 1


def tracker_of(loader: Any) -> LoaderTracker | None:
    """The tracker of a resumable loader; None for any other iterable."""
    return getattr(loader, TRACKER, None)


def make_resumable(loader: Any) -> Any:
    """Let a loader know its exact position.

    The object stays the same; its class becomes a subclass of its own. Iterables that are no `DataLoader` are returned
    as they are: they are read again from their beginning.
    """
    if not isinstance(loader, DataLoader) or tracker_of(loader) is not None:
        return loader
    tracker = LoaderTracker(loader)
    vars(loader)[TRACKER] = tracker
    if tracker.by_index and loader.num_workers > 0:
        loader.collate_fn = _StampingCollate(loader.collate_fn)
    object.__setattr__(loader, "__class__", _resumable_class(type(loader), tracker.states_itself))
    return loader


_CLASSES: dict[type, type] = {}


def _resumable_class(base: type, states_itself: bool) -> type:
    """A single-inheritance subclass: only that may be assigned to a live object's `__class__`."""
    if base in _CLASSES:
        return _CLASSES[base]

    def start(self: Any) -> Any:
        return getattr(self, TRACKER).start(lambda: base.__iter__(self))  # type: ignore[attr-defined]

    def index_sampler(self: Any) -> Any:
        return _WatchedSampler(torch_internals.index_sampler(base, self), getattr(self, TRACKER))

    def get_iterator(self: Any) -> Any:
        tracker = getattr(self, TRACKER)
        if self.num_workers == 0 or not tracker.rotation:
            return getattr(base, torch_internals.GET_ITERATOR)(self)
        return torch_internals.RotatedWorkersIterator(self, tracker.rotation)

    members: dict[str, Any] = {"__iter__": start, "__module__": base.__module__, "__qualname__": base.__qualname__}
    if not states_itself:
        members[torch_internals.INDEX_SAMPLER] = property(index_sampler)
        members[torch_internals.GET_ITERATOR] = get_iterator
    _CLASSES[base] = type(base.__name__, (base,), members)
    return _CLASSES[base]


def resume_at(loader: Any, position: LoaderPosition | None) -> None:
    """Let the loader's next iterator begin at a position."""
    if (tracker := tracker_of(loader)) is not None:
        tracker.resume = position
