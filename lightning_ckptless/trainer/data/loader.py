"""Resumes one dataloader at an exact position.

The user's loader is not modified: training iterates over a `ResumableLoader` around it. It records the generator states
from which the loader draws its sample order, and counts batches. After a restore the loader draws the same order and
skips the batches already returned without reading the dataset. For an iterable dataset, where skipping is impossible,
the batches are fetched again and dropped.

For a map-style dataset, each batch carries the generator states of the worker process that prepared it (`worker_rng`).
On a restart each worker gets its own state back, and the first batch is prepared by the worker whose turn it is. So
augmentation in workers continues exactly, also in persistent workers.

A loader with its own `state_dict` restores its position itself (`first_fetch`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_ckptless.errors import CkptlessError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.trainer.data.dataset_generators import DatasetGenerators, States
from lightning_ckptless.trainer.data.first_fetch import Fetches, FirstFetch
from lightning_ckptless.trainer.data.sampler_replay import (
    Order,
    Switched,
    WatchedSampler,
    apply_sampler,
    dump_sampler,
    sampler_parts,
)
from lightning_ckptless.trainer.data.worker_rng import BatchWithRng, RngCollate, WorkerStart
from lightning_ckptless.trainer.state.changes import Changed, Changes
from lightning_ckptless.trainer.state.reachability import reach
from lightning_ckptless.trainer.state.rng import (
    apply_rng,
    capture_rng,
    owned_generators,
    set_owned_generators,
)


@dataclass(frozen=True)
class LoaderPosition:
    """Position of one loader. The packed fields stay the same for a whole epoch.

    Args:
        yielded: batches returned since the start of the iteration.
        at_start: generators and changed attributes just before the iterator was created, which draws the worker seed.
        at_order: generators and sampler attributes just before an iterator over the sampler was created.
        at_sampler: the same just before the first index was drawn; None before that.
        switched: numbers of the sampler that changed between its batches.
        at_fetch: generators and attributes before the last batch was fetched; None if no batch is prefetched.
        workers: generators of each worker after its last returned batch.
        own_state: `state_dict()` of a loader that restores its own position.
        fetches: observations about the fetches of such a loader.
        dataset: state of the generators that the dataset and the collate function own.
        attributes: changes to the loader, its dataset, samplers and functions since they were created.
        skipped: batches of this iteration that were skipped after a rewind, as if the sampler did not produce them.
        skips_next: batches to skip at the start of the next iteration.
    """

    yielded: int
    at_start: Packed
    at_order: Packed | None
    at_sampler: Packed | None
    switched: Switched
    at_fetch: tuple[Any, Any, Changed] | None
    workers: dict[int, Packed]
    own_state: dict[str, Any] | None
    fetches: Fetches
    dataset: States
    attributes: Changed
    skipped: int = 0
    skips_next: int = 0


class _WatchedIterator:
    """Wraps an iterator that is not torch's own, with a function around its fetch of the next batch."""

    def __init__(self, iterator: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
        self.iterator = iterator
        self.fetch = wrap(iterator.__next__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)

    def __iter__(self) -> _WatchedIterator:
        return self

    def __next__(self) -> Any:
        return self.fetch()

    def __reduce__(self) -> Any:
        # Dataloader iterators cannot be copied; Lightning likewise omits torch's own from a copy.
        return type(None), ()


class LoaderTracker:
    """State of a resumable loader's current iteration.

    Attributes:
        skipped: batches of this iteration that were skipped.
        skips_next: batches to skip at the start of the next iteration.
        shortened_by: skipped batches by which the length of the epoch was reduced.

    References to the loader and its iterator are weak: worker processes end when the last reference to an iterator is
    dropped, not when the garbage collector finds a cycle.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = weakref.ref(loader)
        self._iterator: Callable[[], Any] = lambda: None
        self.generators = DatasetGenerators(loader.dataset, loader.collate_fn)
        self.attributes = watch_attributes(loader)
        self.states_itself = restores_its_position(loader)
        self.iterates_itself = iterates_in_its_own_way(loader)
        self.by_index = torch_internals.is_map_style(loader) and not (self.states_itself or self.iterates_itself)
        self.resume: LoaderPosition | None = None
        self.skipped = self.skips_next = self.shortened_by = 0
        self.yielded: int | None = None
        self.ended = False
        self.at_start = Packed()
        self.at_order: Packed | None = None
        self.at_sampler: Packed | None = None
        self.switched: Switched = {}
        self.at_fetch: tuple[Any, Any, Changed] | None = None
        self.state_before_fetch: dict[str, Any] | None = None
        self.workers: dict[int, Packed] = {}
        self._first = FirstFetch(self._loader, self.generators)
        self._order: Order | None = None
        self._sampler_resume: LoaderPosition | None = None
        self._orders_to_pass = 0
        self._refetch: tuple[Any, Any, Changed] | None = None
        self._prefetched = False

    # ------------------------------------------------------------------ remember

    def position(self, buffered: int) -> LoaderPosition | None:
        """Return the loader's position, not counting prefetched batches; None before the first iteration."""
        if self.yielded is None:
            return None
        self._prefetched |= bool(buffered)
        loader: Any = self._loader()
        own_state = None
        if self.states_itself and loader is not None:
            own_state = self.state_before_fetch if buffered else loader.state_dict()
        return LoaderPosition(
            # A loader that has ended contributed nothing to the prefetched batches.
            yielded=self.yielded - (0 if self.ended else buffered),
            at_start=self.at_start,
            at_order=self.at_order,
            at_sampler=self.at_sampler,
            switched=dict(self.switched),
            at_fetch=self.at_fetch if buffered else None,
            workers=dict(self.workers),
            own_state=own_state,
            fetches=self._first.position(),
            dataset=self.generators.capture(),
            attributes=self.attributes.capture(),
            skipped=self.skipped,
            skips_next=self.skips_next,
        )

    @property
    def will_have_skipped(self) -> int:
        """The number of skipped batches once the next iterator is created at the position to resume."""
        return self.skipped if self.resume is None else self.resume.skipped

    def on_order_made(self, sampler: Any, order: Order) -> None:
        """Called just before an iterator over the sampler is created."""
        resume = self._sampler_resume
        if resume is not None and resume.at_order is not None:
            if not self._orders_to_pass:
                apply_sampler(sampler, resume.at_order)
            self._orders_to_pass = max(0, self._orders_to_pass - 1)
        self.at_order, self._order = dump_sampler(sampler), order

    def on_order_start(self, sampler: Any) -> int:
        """Called just before the first index is drawn; returns the number of index batches to skip."""
        resume, self._sampler_resume = self._sampler_resume, None
        if resume is not None and resume.at_sampler is not None:
            apply_sampler(sampler, resume.at_sampler)
        self.at_sampler = dump_sampler(sampler)
        self.switched = {} if resume is None else dict(resume.switched)
        if not self.by_index:
            return 0
        return self.skipped + (0 if resume is None else resume.yielded)

    def fetch(self, inner: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap the iterator's fetch: record generators before it, and unwrap the worker's generators after it."""

        def fetched() -> Any:
            self._before_fetch()
            try:
                data = self._first.fetch(inner, is_first=not self.yielded) if self.states_itself else inner()
            except StopIteration:
                self.ended = True
                raise
            assert self.yielded is not None
            self.yielded += 1
            if isinstance(data, BatchWithRng):
                self.workers[data.worker] = data.generators
                return data.data
            return data

        return fetched

    def _before_fetch(self) -> None:
        loader: Any = self._loader()
        if self.iterates_itself and self.yielded == 0 and loader is not None:
            self.on_order_start(_sampler_of(loader))
        if self._refetch is not None:
            (rng, owned, attributes), self._refetch = self._refetch, None
            self.attributes.apply(attributes)
            apply_rng(rng)
            self.generators.apply(owned)
        if self._prefetched:
            self.at_fetch = (capture_rng(), self.generators.capture(), self.attributes.capture())
            if self.states_itself and loader is not None:
                self.state_before_fetch = loader.state_dict()

    # ------------------------------------------------------------------ start

    def start(self, loader: DataLoader[Any]) -> Any:
        """Create the loader's iterator, at the position to resume if there is one."""
        resume, self.resume = self.resume, None
        self._prefetched |= not _has_length(loader)
        if resume is not None:
            return self._restart(loader, resume)
        self.skipped, self.skips_next = self.skips_next, 0
        owned = [owned_generators(part) for part in holders(loader)]
        before = pack((capture_rng(), owned, self.generators.capture(), self.attributes.capture()))
        self.at_sampler = None
        if self.states_itself:
            self._first.begin()
        last = self._iterator()
        iterator = self._watch(self._make(loader), yielded=0)
        if iterator is not last:
            # Persistent workers keep their seed and generators.
            self.at_start, self.workers = before, {}
        return iterator

    def _make(self, loader: DataLoader[Any], workers: dict[int, Packed] | None = None, rotation: int = 0) -> Any:
        """Create an iterator of the loader, with its sampler watched if the loader iterates in the usual way.

        Args:
            loader: the user's loader.
            workers: initial generators of the worker processes.
            rotation: index of the worker that prepares the first batch.
        """
        if self.states_itself or self.iterates_itself:
            return iter(loader)
        instead: dict[str, Any] = {}
        if self.by_index and loader.num_workers > 0:
            instead["collate_fn"] = RngCollate(loader.collate_fn)
        if workers:
            instead["worker_init_fn"] = WorkerStart(loader.worker_init_fn, loader.collate_fn, workers)
        sampler = WatchedSampler(torch_internals.index_sampler(loader), self)
        return torch_internals.make_iterator(loader, sampler, rotation, instead)

    def _restart(self, loader: DataLoader[Any], resume: LoaderPosition) -> Any:
        self.at_start, self.workers = resume.at_start, dict(resume.workers)
        self.skipped, self.skips_next = resume.skipped, resume.skips_next
        rng, owned, of_dataset, attributes = unpack(resume.at_start)
        self.attributes.apply(attributes)
        apply_rng(rng)
        self.generators.apply(of_dataset)
        for part, generators in zip(holders(loader), owned, strict=True):
            set_owned_generators(part, generators)
        if resume.own_state is not None:
            self._first.restore(resume.own_state, resume.fetches, resume.yielded)
        else:
            # An iterator with workers iterates its sampler twice and discards the first iterator.
            self._sampler_resume, self._orders_to_pass = resume, min(1, loader.num_workers)
        self.at_sampler = None
        rotation = resume.yielded % loader.num_workers if loader.num_workers and self.by_index else 0
        iterator = self._watch(self._make(loader, resume.workers, rotation), yielded=0)
        self._skip(iterator, resume)
        # The epoch length is read next, and must be as it was when the epoch began.
        self.attributes.apply(attributes)
        self.generators.apply(resume.dataset)
        return iterator

    def _skip(self, iterator: Any, resume: LoaderPosition) -> None:
        if resume.own_state is None and not self.by_index:
            read_again(iterator, resume.yielded)
        elif self.by_index:
            if resume.yielded:
                assert self._order is not None
                self._order.start()
            torch_internals.set_batches_yielded(iterator, resume.yielded)
        self.yielded = resume.yielded

    def _watch(self, iterator: Any, *, yielded: int) -> Any:
        self.yielded, self.ended = yielded, False
        if iterator is self._iterator():
            return iterator
        if torch_internals.is_own_iterator(iterator):
            torch_internals.wrap_fetch(iterator, self.fetch)
        else:
            self._first.watch(iterator)
            iterator = _WatchedIterator(iterator, self.fetch)
        self._iterator = weakref.ref(iterator)
        return iterator

    def before_buffer(self, position: LoaderPosition) -> None:
        """Fetch a batch that was prefetched again, with the generators as they were before it."""
        self._refetch, self._prefetched = position.at_fetch, True


def holders(loader: DataLoader[Any]) -> list[Any]:
    """Return the objects besides the dataset whose generators may affect the start of an iteration."""
    return [loader, *sampler_parts(_sampler_of(loader))]


def read_again(iterator: Iterator[Any], batches: int) -> None:
    """Fetch and drop the batches that were returned before a fault.

    Raises:
        CkptlessError: there are fewer batches than before.
    """
    end = object()
    for done in range(batches):
        if next(iterator, end) is end:
            raise CkptlessError(
                f"a training dataloader returned {batches} batches before the fault, but only {done} when read again: "
                "an iterable must return the same batches each time. Give it a state_dict(), or use a map-style Dataset"
            )


def watch_attributes(loader: DataLoader[Any]) -> Changes:
    """Watch a loader and the objects in it: its dataset and what that holds, its samplers and functions.

    If the loader restores its own position, objects with a `state_dict` are skipped: they restore their attributes from
    it, some only at the next batch.
    """
    owners = reach(loader, "loader")
    if restores_its_position(loader):
        owners = ((path, owner) for path, owner in owners if not hasattr(type(owner), "state_dict"))
    return Changes(owners, {"loader": ("_iterator", "collate_fn", "worker_init_fn")})


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def _sampler_of(loader: Any) -> Any:
    # `or` would raise for a sampler whose `__len__` raises.
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def restores_its_position(loader: Any) -> bool:
    """Return whether a loader's own `state_dict()` is needed to restore its position.

    For a map-style dataset, the `state_dict` of a `StatefulDataLoader` holds only a count and not the order of a
    sampler that is wrapped for several ranks: the order is drawn again, as for any other loader. With workers, it uses
    its own kind of iterator, and only its `state_dict` knows the position.
    """
    if not callable(getattr(loader, "state_dict", None)):
        return False
    return loader.num_workers > 0 or not torch_internals.is_map_style(loader) or hasattr(loader.dataset, "state_dict")


def iterates_in_its_own_way(loader: DataLoader[Any]) -> bool:
    """Return whether a loader overrides how `DataLoader` creates iterators, and has no `state_dict` to use."""
    return not restores_its_position(loader) and torch_internals.has_own_iteration(type(loader))


class ResumableLoader:
    """Wraps a dataloader for training; the dataloader itself is not modified.

    Args:
        loader: the dataloader.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.tracker = LoaderTracker(loader)

    def __iter__(self) -> Any:
        return self.tracker.start(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __reduce__(self) -> Any:
        # Copy only the user's loader: the tracker describes an iterator that is not copied.
        return _identity, (self.loader,)


def _identity(loader: Any) -> Any:
    return loader


def make_resumable(loader: Any) -> Any:
    """Wrap a `DataLoader` so that it tracks its exact position; other iterables are returned unchanged."""
    return ResumableLoader(loader) if isinstance(loader, DataLoader) else loader


def tracker_of(loader: Any) -> LoaderTracker | None:
    """Return the tracker of a resumable loader; None for any other iterable."""
    return loader.tracker if isinstance(loader, ResumableLoader) else None


def resume_at(loader: Any, position: LoaderPosition | None) -> None:
    """Make the loader's next iterator start at a position."""
    if (tracker := tracker_of(loader)) is not None:
        tracker.resume = position
