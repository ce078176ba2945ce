"""One dataloader at an exact position.

The user's loader stays as it is: what training iterates over is a `ResumableLoader` around it. That remembers, at each
start, the random numbers that the loader is about to draw its order from, and counts the batches. Put back, the loader
draws the same order again and skips what was handed out without asking the dataset. Where that is not possible (an
iterable dataset) the batches are fetched again and dropped.

Random numbers drawn in worker processes come home with the batches of a map-style dataset (`stamps`); on a restart each
worker gets its own state back, and the first batch is prepared by the worker whose turn it is. So augmentation in
workers goes on exactly, in persistent workers too.

A loader that restores its own position (`state_dict`) is left to do so (`first_fetch`).
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
from lightning_ckptless.trainer.data.first_fetch import Fetches, FirstFetch
from lightning_ckptless.trainer.data.sampler_replay import (
    Order,
    Switched,
    WatchedSampler,
    apply_sampler,
    dump_sampler,
    sampler_parts,
)
from lightning_ckptless.trainer.data.worker_rng import Stamped, StampingCollate, WorkerStart
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
    """Where one loader is. Bytes are pickles that stay the same for a whole epoch.

    Args:
        yielded: batches handed out since the start of the iteration.
        at_start: generators and changed attributes just before the iterator was made (it draws its workers' seed).
        at_order: generators and the sampler's attributes just before an iterator was made of the sampler.
        at_sampler: the same just before the first index was drawn; None before that.
        switched: numbers of the sampler that have changed between its batches.
        at_fetch: generators and attributes before the last batch was fetched; None where no batch lies prefetched.
        workers: per worker its generators after its last batch that was handed out.
        own_state: `state_dict()` of a loader that can say its own position.
        fetches: what is known of the fetches of such a loader.
        dataset: state of the generators that the dataset owns.
        attributes: what differs in the loader, its dataset, samplers and functions from when they were made.
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
    dataset: dict[str, Any]
    attributes: Changed


class _WatchedIterator:
    """An iterator that is not one of torch's own, with a function around its fetch of the next batch."""

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
        # Iterators of dataloaders cannot be copied; Lightning leaves torch's own out of a copy in the same way.
        return type(None), ()


class LoaderTracker:
    """What a resumable loader remembers about its current iteration.

    It refers to the loader and its iterator weakly: worker processes end when the last user of an iterator lets go of
    it, not when the garbage collector finds a cycle.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = weakref.ref(loader)
        self._iterator: Callable[[], Any] = lambda: None
        self.dataset = loader.dataset
        self.attributes = watch_attributes(loader)
        self.states_itself = says_its_position(loader)
        self.iterates_itself = iterates_in_its_own_way(loader)
        self.by_index = torch_internals.is_map_style(loader) and not (self.states_itself or self.iterates_itself)
        self.resume: LoaderPosition | None = None
        self.yielded: int | None = None
        self.ended = False
        self.at_start = Packed()
        self.at_order: Packed | None = None
        self.at_sampler: Packed | None = None
        self.switched: Switched = {}
        self.at_fetch: tuple[Any, Any, Changed] | None = None
        self.state_before_fetch: dict[str, Any] | None = None
        self.workers: dict[int, Packed] = {}
        self._first = FirstFetch(self._loader, self.dataset)
        self._order: Order | None = None
        self._sampler_resume: LoaderPosition | None = None
        self._orders_to_pass = 0
        self._refetch: tuple[Any, Any, Changed] | None = None
        self._prefetched = False

    # ------------------------------------------------------------------ remember

    def position(self, buffered: int) -> LoaderPosition | None:
        """Where the loader is, not counting batches that lie prefetched behind it."""
        if self.yielded is None:
            return None
        self._prefetched |= bool(buffered)
        loader: Any = self._loader()
        own_state = None
        if self.states_itself and loader is not None:
            own_state = self.state_before_fetch if buffered else loader.state_dict()
        return LoaderPosition(
            # One that has ended gave nothing to what lies prefetched.
            yielded=self.yielded - (0 if self.ended else buffered),
            at_start=self.at_start,
            at_order=self.at_order,
            at_sampler=self.at_sampler,
            switched=dict(self.switched),
            at_fetch=self.at_fetch if buffered else None,
            workers=dict(self.workers),
            own_state=own_state,
            fetches=self._first.position(),
            dataset=owned_generators(self.dataset),
            attributes=self.attributes.capture(),
        )

    def on_order_made(self, sampler: Any, order: Order) -> None:
        """Called when an iterator is about to be made of the sampler."""
        resume = self._sampler_resume
        if resume is not None and resume.at_order is not None:
            if not self._orders_to_pass:
                apply_sampler(sampler, resume.at_order)
            self._orders_to_pass = max(0, self._orders_to_pass - 1)
        self.at_order, self._order = dump_sampler(sampler), order

    def on_order_start(self, sampler: Any) -> int:
        """Called when the first index is about to be drawn; returns how many index batches to skip."""
        resume, self._sampler_resume = self._sampler_resume, None
        if resume is not None and resume.at_sampler is not None:
            apply_sampler(sampler, resume.at_sampler)
        self.at_sampler = dump_sampler(sampler)
        self.switched = {} if resume is None else dict(resume.switched)
        return resume.yielded if resume is not None and self.by_index else 0

    def fetch(self, inner: Callable[[], Any]) -> Callable[[], Any]:
        """The iterator's fetch, with the stamp taken off and the generators before it kept."""

        def fetched() -> Any:
            self._before_fetch()
            try:
                data = self._first.fetch(inner, is_first=not self.yielded) if self.states_itself else inner()
            except StopIteration:
                self.ended = True
                raise
            assert self.yielded is not None
            self.yielded += 1
            if isinstance(data, Stamped):
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
            set_owned_generators(self.dataset, owned)
        if self._prefetched:
            self.at_fetch = (capture_rng(), owned_generators(self.dataset), self.attributes.capture())
            if self.states_itself and loader is not None:
                self.state_before_fetch = loader.state_dict()

    # ------------------------------------------------------------------ start

    def start(self, loader: DataLoader[Any]) -> Any:
        """Make the loader's iterator, at the position to resume if there is one."""
        resume, self.resume = self.resume, None
        self._prefetched |= not _has_length(loader)
        if resume is not None:
            return self._restart(loader, resume)
        owned = [owned_generators(part) for part in self._holders(loader)]
        before = pack((capture_rng(), owned, self.attributes.capture()))
        self.at_sampler = None
        if self.states_itself:
            self._first.begin()
        last = self._iterator()
        iterator = self._watch(self._make(loader), yielded=0)
        if iterator is not last:
            # Persistent workers live on with the seed and the generators that they have.
            self.at_start, self.workers = before, {}
        return iterator

    def _make(self, loader: DataLoader[Any], workers: dict[int, Packed] | None = None, rotation: int = 0) -> Any:
        """An iterator of the loader, watched where it is of the usual kind.

        Args:
            loader: of the user.
            workers: generators that worker processes are to begin with.
            rotation: index of the worker that prepares the first batch.
        """
        if self.states_itself or self.iterates_itself:
            return iter(loader)
        instead: dict[str, Any] = {}
        if self.by_index and loader.num_workers > 0:
            instead["collate_fn"] = StampingCollate(loader.collate_fn)
        if workers:
            instead["worker_init_fn"] = WorkerStart(loader.worker_init_fn, workers)
        sampler = WatchedSampler(torch_internals.index_sampler(loader), self)
        return torch_internals.make_iterator(loader, sampler, rotation, instead)

    def _holders(self, loader: DataLoader[Any]) -> list[Any]:
        """What may hold generators that an iteration begins with."""
        return [loader, self.dataset, *sampler_parts(_sampler_of(loader))]

    def _restart(self, loader: DataLoader[Any], resume: LoaderPosition) -> Any:
        self.at_start, self.workers = resume.at_start, dict(resume.workers)
        rng, owned, attributes = unpack(resume.at_start)
        self.attributes.apply(attributes)
        apply_rng(rng)
        for part, generators in zip(self._holders(loader), owned, strict=True):
            set_owned_generators(part, generators)
        if resume.own_state is not None:
            self._first.restore(resume.own_state, resume.fetches, resume.yielded)
        else:
            # An iterator with workers asks its sampler twice, the first time in vain.
            self._sampler_resume, self._orders_to_pass = resume, min(1, loader.num_workers)
        self.at_sampler = None
        rotation = resume.yielded % loader.num_workers if loader.num_workers and self.by_index else 0
        iterator = self._watch(self._make(loader, resume.workers, rotation), yielded=0)
        self._skip(iterator, resume)
        # The length of the epoch is taken next, as it was when the epoch began.
        self.attributes.apply(attributes)
        set_owned_generators(self.dataset, resume.dataset)
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
        """Have a batch that lay prefetched made again with the generators as they were before it."""
        self._refetch, self._prefetched = position.at_fetch, True


def read_again(iterator: Iterator[Any], batches: int) -> None:
    """Fetch batches that were handed out before a fault, and drop them.

    Raises:
        CkptlessError: there are fewer of them than before.
    """
    end = object()
    for done in range(batches):
        if next(iterator, end) is end:
            raise CkptlessError(
                f"a training dataloader gave {batches} batches before the fault and {done} on being read again: an "
                "iterable must give the same batches each time. Give it a state_dict(), or read from a Dataset by index"
            )


def watch_attributes(loader: DataLoader[Any]) -> Changes:
    """Watch a loader, and the objects in it: its dataset with what lies inside, its samplers and functions.

    A loader that restores its own position is left alone, and so is what has a `state_dict` in it: they take their
    attributes from that, some of them not before the next batch.
    """
    owners = reach(loader, "loader")
    if says_its_position(loader):
        owners = ((path, owner) for path, owner in owners if not hasattr(type(owner), "state_dict"))
    return Changes(owners, {"loader": ("_iterator", "collate_fn", "worker_init_fn")})


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def _sampler_of(loader: Any) -> Any:
    # Not by `or`: a sampler that does not know its length has no truth value.
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def says_its_position(loader: Any) -> bool:
    """Whether a loader's own `state_dict()` is needed to come back to a position.

    That of a `StatefulDataLoader` holds nothing of a map-style dataset but a count, and not the order of a sampler that
    is wrapped for several ranks: there the order is drawn again, as for any other loader. With workers its iterator is
    of a kind of its own, and only it can say where it is.
    """
    if not callable(getattr(loader, "state_dict", None)):
        return False
    return loader.num_workers > 0 or not torch_internals.is_map_style(loader) or hasattr(loader.dataset, "state_dict")


def iterates_in_its_own_way(loader: DataLoader[Any]) -> bool:
    """Whether a loader makes iterators in another way than `DataLoader`, and cannot say its position."""
    return not says_its_position(loader) and torch_internals.has_own_iteration(type(loader))


class ResumableLoader:
    """What training iterates over in the place of a dataloader, which stays as it is.

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
        # A copy is one of the user's loader: what is remembered here is about the iterator that is not copied.
        return _same, (self.loader,)


def _same(loader: Any) -> Any:
    return loader


def make_resumable(loader: Any) -> Any:
    """A loader that knows its exact position; iterables that are no `DataLoader` are read again from their start."""
    return ResumableLoader(loader) if isinstance(loader, DataLoader) else loader


def tracker_of(loader: Any) -> LoaderTracker | None:
    """The tracker of a resumable loader; None for any other iterable."""
    return loader.tracker if isinstance(loader, ResumableLoader) else None


def resume_at(loader: Any, position: LoaderPosition | None) -> None:
    """Let the loader's next iterator begin at a position."""
    if (tracker := tracker_of(loader)) is not None:
        tracker.resume = position
