"""The private torch names that we use: a test fails if a new version lacks one."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ckptless.internals import torch_internals


def test_the_version_counter_counts_writes_in_place() -> None:
    tensor = torch.zeros(3)
    before = torch_internals.version_counter(tensor)
    tensor.add_(1)
    tensor.detach()[0] = 5
    assert torch_internals.version_counter(tensor) == before + 2


def test_foreach_copy_copies_and_counts() -> None:
    targets = [torch.zeros(2, 3), torch.zeros((), dtype=torch.int64), torch.empty(0)]
    sources = [torch.arange(6.0).reshape(3, 2).t(), torch.tensor(7), torch.empty(0)]
    before = torch_internals.version_counter(targets[0])
    torch_internals.foreach_copy(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert torch_internals.version_counter(targets[0]) > before


def test_operators_are_called_through_a_function_in_forward_and_backward() -> None:
    names: list[str] = []

    def noted(name: str, call: Callable[[], Any]) -> Any:
        names.append(name)
        return call()

    weight = torch.ones(2, 2, requires_grad=True)
    with torch_internals.AroundOperators(noted):
        torch.autograd.grad((torch.ones(3, 2) @ weight).sum(), weight)
    assert names.count("aten.mm") == 2
    names.clear()
    assert torch.ones(2).sum() == 2 and names == []


def test_leaves_of_nested_data() -> None:
    thing = object()
    assert torch_internals.leaves_of({"a": [1, (2,)], "b": thing}) == [1, 2, thing]
    assert torch_internals.leaves_of(thing) == [thing]


def test_foreach_copy_accepts_empty_lists() -> None:
    torch_internals.foreach_copy([], [])


# ---------------------------------------------------------------------- data parallelism


# In a separate process, as torch frees a process group only when it creates the next one.
BUCKETS = """
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from lightning_ckptless.internals import torch_internals

    def parallel(**options):
        return DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)), **options)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = parallel()
    assert not torch_internals.settle_buckets(model)
    assert torch_internals.bucket_layout(model) == [[0, 1, 2, 3]]
    model(torch.ones(2, 4)).sum().backward()
    assert torch_internals.settle_buckets(model)
    layout = torch_internals.bucket_layout(model)

    from lightning_ckptless.trainer.state.gradient_buckets import BucketWatch
    assert BucketWatch().settled(model) == layout
    sparse = DistributedDataParallel(torch.nn.Embedding(4, 4, sparse=True))
    sparse(torch.tensor([1])).sum().backward()
    assert BucketWatch().settled(sparse) is None
    assert layout == [[3, 2, 1, 0]]

    model.module[0].requires_grad_(False)
    assert torch_internals.bucket_layout(model) == layout

    other = parallel()
    other.module[0].weight.requires_grad_(False)
    torch_internals.set_bucket_layout(other, layout)
    assert [p.requires_grad for p in other.parameters()] == [False, True, True, True]
    other.module[0].weight.requires_grad_(True)
    assert torch_internals.bucket_layout(other) == layout
    other(torch.ones(2, 4)).sum().backward()
    assert other.module[0].weight.grad is not None
    assert torch_internals.settle_buckets(other)
    assert torch_internals.bucket_layout(other) == layout

    class Unused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = torch.nn.Linear(4, 4), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    unused = DistributedDataParallel(Unused())
    unused(torch.ones(2, 4)).sum().backward()
    assert not torch_internals.settle_buckets(unused)
    try:
        unused(torch.ones(2, 4))
    except RuntimeError as error:
        assert "Expected to have finished reduction in the prior iteration" in str(error)
    else:
        raise AssertionError("parameters without gradients are refused by the next forward pass")

    seen = []
    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    still = parallel(static_graph=True)
    still.register_comm_hook(None, hook)
    torch_internals.set_bucket_layout(still, [[3, 1], [2, 0]])
    still(torch.ones(2, 4)).sum().backward()
    assert seen and still.static_graph
    print("all hold")
"""


def test_buckets_are_rebuilt_after_the_first_step_and_can_be_set() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(BUCKETS)], capture_output=True, text=True, check=False)
    # Some versions of gloo write a line themselves.
    assert done.stdout.splitlines()[-1:] == ["all hold"], done.stderr


# ---------------------------------------------------------------------- dataloaders


class Squares(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index**2


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 4


class InAnotherWay(DataLoader[int]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


def test_map_style_loaders_are_recognized() -> None:
    assert torch_internals.is_map_style(DataLoader(Squares()))
    assert not torch_internals.is_map_style(DataLoader(Stream()))


def test_the_index_sampler_of_a_loader_is_found() -> None:
    batched, single = DataLoader(Squares(), batch_size=2), DataLoader(Squares(), batch_size=None)
    assert torch_internals.index_sampler(batched) is batched.batch_sampler
    assert torch_internals.index_sampler(single) is single.sampler


def test_iterators_of_torch_are_recognized() -> None:
    assert not torch_internals.has_own_iteration(DataLoader)
    assert torch_internals.has_own_iteration(InAnotherWay)
    assert torch_internals.is_own_iterator(iter(DataLoader(Squares())))
    assert not torch_internals.is_own_iterator(iter(InAnotherWay(Squares())))


def test_a_wrapped_iterator_is_freed_without_the_garbage_collector() -> None:
    calls: list[str] = []

    def noted(inner: Callable[[], Any]) -> Callable[[], Any]:
        def fetch() -> Any:
            calls.append("fetch")
            return inner()

        return fetch

    iterator = iter(DataLoader(Squares(), batch_size=None))
    torch_internals.wrap_fetch(iterator, noted)
    assert [next(iterator), next(iterator)] == [0, 1]
    assert calls == ["fetch", "fetch"]
    gc.disable()
    try:
        gone = weakref.ref(iterator)
        del iterator
        assert gone() is None
    finally:
        gc.enable()


def test_the_number_of_yielded_batches_can_be_set() -> None:
    loader = DataLoader(SizedStream(), batch_size=None)
    assert len(loader) == 4
    iterator = iter(loader)
    torch_internals.set_batches_yielded(iterator, 4)
    with pytest.warns(UserWarning, match="5 samples have been fetched"):
        next(iterator)


def test_parameters_and_buffers_are_live_dictionaries() -> None:
    module = torch.nn.BatchNorm1d(2)
    parameters, buffers = torch_internals.parameter_dicts(module)
    module.weight = torch.nn.Parameter(torch.zeros(2))
    module.running_mean = torch.ones(2)
    assert parameters["weight"] is module.weight
    assert buffers["running_mean"] is module.running_mean


def test_attributes_of_a_loader_are_replaced_for_its_iterator() -> None:
    loader = DataLoader(Squares(), batch_size=2)
    before = dict(vars(loader))
    iterator = torch_internals.make_iterator(loader, [[3, 1]], 0, {"collate_fn": list})
    assert list(iterator) == [[9, 1]]
    assert vars(loader) == before


def test_inner_iterators_of_a_loader_are_watched() -> None:
    loader, fetches = InAnotherWay(Squares(), batch_size=2), list[str]()

    def noted(inner: Callable[[], Any]) -> Callable[[], Any]:
        def fetched() -> Any:
            fetches.append("fetch")
            return inner()

        return fetched

    iterator = iter(loader)
    with torch_internals.watching_inner_iterators(loader, noted):
        next(iterator)
    next(iter(loader))
    assert fetches == ["fetch"]


def test_group_names_restart_after_a_failed_creation() -> None:
    """torch counts the failed group, and would name the next one differently from a new process."""
    names = []
    for _ in range(2):
        with pytest.raises(ValueError, match="no such backend"):
            _make_default_group("fails")
        torch_internals.restart_group_names()
        _make_default_group("gloo")
        names.append(dist.group.WORLD.group_name)  # type: ignore[union-attr]
        dist.destroy_process_group()
    assert names == ["0", "0"]


def test_ranks_have_a_store_in_common() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=0, world_size=1)
    inner = torch_internals.store_of_ranks()
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    inner.set("key", "value")
    dist.destroy_process_group()
    assert store.get("key") == b"value"


def test_the_excepthook_is_preserved() -> None:
    before = sys.excepthook
    with torch_internals.unchanged_excepthook():
        _make_default_group("gloo")
        assert sys.excepthook is not before, "torch no longer wraps it, so it need not be preserved"
    dist.destroy_process_group()
    assert sys.excepthook is before


def _make_default_group(backend: str) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no such backend")

    if not hasattr(dist.Backend, "FAILS"):
        dist.Backend.register_backend("fails", fail, devices=["cpu"])
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def test_finished_work_does_not_wait() -> None:
    assert torch_internals.finished_work().wait()
