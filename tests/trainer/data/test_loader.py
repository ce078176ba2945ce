"""A restored dataloader returns the same batches as without a restart, whatever draws its order and noise."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, get_worker_info

from lightning_ckptless.errors import CkptlessError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.trainer.data.loader import make_resumable, resume_at, tracker_of
from lightning_ckptless.trainer.data.worker_rng import BatchWithRng
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng
from tests.lab.parts import Numbers, Stream
from tests.trainer.loaders import BATCHES, LOADERS, SAMPLES, WORKERS, numbered, own_position


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def exact(value: Any) -> Any:
    """Convert a batch to values that compare bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [exact(item) for item in value] if isinstance(value, list | tuple) else value


def train_on(iterator: Iterator[Any], batches: int) -> list[Any]:
    """Fetch batches, and draw random numbers in between as a model does."""
    return [
        (exact(batch), torch.rand(1).item(), random.random(), np.random.rand()) for batch in islice(iterator, batches)
    ]


@dataclass
class Stopped:
    """The data position in a version."""

    position: Packed
    rng: Packed


def whole(make: Callable[[], Any], *, resumable: bool, epochs: int = 2) -> list[Any]:
    """Return all batches of some epochs, and the generators after them."""
    seed(0)
    loader = make_resumable(make()) if resumable else make()
    rows = [row for _ in range(epochs) for row in train_on(iter(loader), BATCHES)]
    return [*rows, pack(capture_rng())]


def first_part(make: Callable[[], Any], epoch: int, batches: int) -> tuple[list[Any], Stopped]:
    """Return the batches up to a stop, and what is needed to continue from it."""
    seed(0)
    loader = make_resumable(make())
    rows = [row for _ in range(epoch) for row in train_on(iter(loader), BATCHES)]
    iterator = iter(loader)
    rows += train_on(iterator, batches)
    tracker = tracker_of(loader)
    assert tracker is not None
    return rows, Stopped(pack(tracker.position(buffered=0)), pack(capture_rng()))


def rest(make: Callable[[], Any], stopped: Stopped, epoch: int, batches: int) -> list[Any]:
    """Return the batches after a stop from another loader, starting from different generator states."""
    seed(99)
    loader = make_resumable(make())
    position = unpack(stopped.position)
    resume_at(loader, position)
    iterator = iter(loader)
    tracker = tracker_of(loader)
    assert tracker is not None
    tracker.attributes.apply(position.attributes)
    apply_rng(unpack(stopped.rng))
    rows = train_on(iterator, BATCHES - batches)
    rows += [row for _ in range(epoch + 1, 2) for row in train_on(iter(loader), BATCHES)]
    return [*rows, pack(capture_rng())]


def resumed(make: Callable[[], Any], epoch: int, batches: int) -> list[Any]:
    """Return all batches, with a stop in between."""
    rows, stopped = first_part(make, epoch, batches)
    return rows + rest(make, stopped, epoch, batches)


# ---------------------------------------------------------------------- without a restart


@pytest.mark.parametrize("case", LOADERS)
def test_a_resumable_loader_returns_the_same_batches(case: str) -> None:
    assert whole(LOADERS[case], resumable=True) == whole(LOADERS[case], resumable=False)


@pytest.mark.parametrize("case", WORKERS)
def test_a_resumable_loader_with_workers_returns_the_same_batches(case: str) -> None:
    assert whole(WORKERS[case], resumable=True) == whole(WORKERS[case], resumable=False)


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 1, "persistent_workers": True}])
def test_the_users_loader_is_not_modified(options: dict[str, Any]) -> None:
    loader = numbered(**options)
    before = type(loader), dict(vars(loader))
    resumable = make_resumable(loader)
    iterator = iter(resumable)
    next(iterator)
    assert (type(loader), vars(loader) | {"_iterator": None}) == before
    assert len(resumable) == len(loader)


def test_a_copy_of_a_resumable_loader_is_a_copy_of_the_users_loader() -> None:
    resumable = make_resumable(numbered())
    next(iter(resumable))
    for copied in (copy.deepcopy(resumable), pickle.loads(pickle.dumps(resumable))):
        assert type(copied) is DataLoader
        assert len(copied) == BATCHES


def test_an_iterable_that_is_not_a_dataloader_is_returned_unchanged() -> None:
    batches = [1, 2, 3]
    assert make_resumable(batches) is batches
    assert tracker_of(batches) is None
    resume_at(batches, None)


def test_a_loader_before_its_first_iteration_has_no_position() -> None:
    tracker = tracker_of(make_resumable(numbered()))
    assert tracker is not None
    assert tracker.position(buffered=0) is None


# ---------------------------------------------------------------------- after a restart


@pytest.mark.parametrize("case", LOADERS)
def test_a_loader_resumes_after_any_batch(case: str) -> None:
    expected = whole(LOADERS[case], resumable=False)
    for epoch in range(2):
        for batches in range(BATCHES + 1):
            assert resumed(LOADERS[case], epoch, batches) == expected, (epoch, batches)


def test_a_stateful_dataset_that_draws_its_order_at_the_first_sample_draws_it_again() -> None:
    expected = whole(own_position, resumable=False)
    for epoch, batches in ((0, 2), (0, 4), (1, 3)):
        assert resumed(own_position, epoch, batches) == expected, (epoch, batches)


def test_a_warning_names_draws_of_unknown_purpose(caplog: pytest.LogCaptureFixture) -> None:
    """After one batch it is unknown whether a dataset draws for each batch or once when an iteration starts."""
    resumed(own_position, 0, 1)
    assert "(StatefulDataLoader) draws random numbers in the training process when an iteration" in caplog.text


@pytest.mark.parametrize("case", WORKERS)
def test_workers_resume_after_a_batch(case: str) -> None:
    expected = whole(WORKERS[case], resumable=False)
    for epoch, batches in ((0, 3), (1, 1)):
        assert resumed(WORKERS[case], epoch, batches) == expected, (epoch, batches)


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    drop_last=st.booleans(),
    stops=st.lists(st.integers(0, 12), max_size=3),
)
def test_a_loader_resumes_after_any_stops(samples: int, batch_size: int, drop_last: bool, stops: list[int]) -> None:
    def make() -> Any:
        return make_resumable(DataLoader(Numbers(samples), batch_size, shuffle=True, drop_last=drop_last))

    seed(0)
    expected = train_on(iter(make()), samples)
    seed(0)
    loader = make()
    iterator, rows = iter(loader), list[Any]()
    for stop in sorted(stops):
        rows += train_on(iterator, stop - len(rows))
        tracker, rng = tracker_of(loader), capture_rng()
        assert tracker is not None
        position = unpack(pack(tracker.position(buffered=0)))
        seed(99)
        loader = make()
        resume_at(loader, position)
        iterator = iter(loader)
        apply_rng(rng)
    assert rows + train_on(iterator, samples) == expected


def test_returned_samples_are_not_read_again() -> None:
    asked: list[int] = []

    class Asked(Numbers):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(index)
            return super().__getitem__(index)

    def make() -> Any:
        return DataLoader(Asked(SAMPLES), batch_size=2)

    _, stopped = first_part(make, 0, 3)
    asked.clear()
    rest(make, stopped, 1, 3)
    assert asked == [6, 7, 8, 9]


def test_a_second_iteration_starts_from_the_beginning() -> None:
    _, stopped = first_part(numbered, 0, 3)
    loader = make_resumable(numbered())
    resume_at(loader, unpack(stopped.position))
    assert len(list(loader)) == 2
    assert len(list(loader)) == BATCHES


def test_a_prefetched_batch_is_fetched_again() -> None:
    def make() -> Any:
        return make_resumable(DataLoader(Stream(SAMPLES, 0, 1), batch_size=2))

    seed(0)
    loader = make()
    iterator, tracker = iter(loader), tracker_of(loader)
    assert tracker is not None
    train_on(iterator, 2)
    prefetched, position = exact(next(iterator)), unpack(pack(tracker.position(buffered=1)))
    assert position.yielded == 2
    seed(99)
    loader = make()
    resume_at(loader, position)
    iterator, tracker = iter(loader), tracker_of(loader)
    assert tracker is not None
    tracker.before_buffer(position)
    assert exact(next(iterator)) == prefetched


def test_an_exhausted_loader_has_no_prefetched_batches() -> None:
    loader = make_resumable(numbered())
    assert len(list(loader)) == BATCHES
    tracker = tracker_of(loader)
    assert tracker is not None
    position = tracker.position(buffered=1)
    assert position is not None
    assert position.yielded == BATCHES


def test_an_iterable_that_has_become_shorter_is_an_error() -> None:
    _, stopped = first_part(LOADERS["iterable"], 0, 4)
    loader = make_resumable(DataLoader(Stream(4, 0, 1), batch_size=2))
    resume_at(loader, unpack(stopped.position))
    message = r"returned 4 batches before the fault, but only 2 when read again.*state_dict"
    with pytest.raises(CkptlessError, match=message):
        iter(loader)


# ---------------------------------------------------------------------- workers


def test_workers_end_with_the_last_reference_to_their_iterator() -> None:
    gc.disable()
    try:
        loader = make_resumable(numbered(num_workers=2))
        iterator = iter(loader)
        next(iterator)
        assert len(multiprocessing.active_children()) == 2
        del iterator
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_persistent_workers_end_with_their_loader() -> None:
    gc.disable()
    try:
        loader = make_resumable(numbered(num_workers=1, persistent_workers=True))
        next(iter(loader))
        assert len(multiprocessing.active_children()) == 1
        del loader
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_workers_restarted_after_a_shutdown_use_a_new_seed() -> None:
    """Lightning shuts them down between two calls of `fit` with the same loader."""

    def make() -> Any:
        return numbered(num_workers=1, persistent_workers=True)

    def after_shutdown(loader: Any) -> Any:
        seed(0)
        next(iter(loader))
        users_loader = getattr(loader, "loader", loader)
        users_loader._iterator._shutdown_workers()
        users_loader._iterator = None
        seed(1)
        return iter(loader)

    expected = train_on(after_shutdown(make()), BATCHES)
    loader = make_resumable(make())
    rows = train_on(after_shutdown(loader), 2)
    tracker, rng = tracker_of(loader), capture_rng()
    assert tracker is not None
    position = unpack(pack(tracker.position(buffered=0)))
    loader = make_resumable(make())
    resume_at(loader, position)
    iterator = iter(loader)
    apply_rng(rng)
    assert rows + train_on(iterator, BATCHES) == expected


class WorkerOf(Numbers):
    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        assert worker is not None
        return worker.id


def test_the_first_batch_is_prepared_by_the_worker_whose_turn_it_is() -> None:
    loader = DataLoader(WorkerOf(4), batch_size=None, num_workers=2)
    assert list(torch_internals.RotatedWorkersIterator(loader, 1)) == [1, 0, 1, 0]


class Pinned:
    """A batch with its own `pin_memory`."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned

    def pin_memory(self) -> Pinned:
        return Pinned(pinned=True)


def test_a_batch_with_worker_generators_is_pinned() -> None:
    batch = BatchWithRng({"batch": Pinned()}, 1, Packed(b"generators")).pin_memory()
    assert batch.data["batch"].pinned
    assert (batch.worker, batch.generators) == (1, Packed(b"generators"))
