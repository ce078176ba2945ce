"""All uses of private torch names, except those for sharded models and for the rendezvous.

Each has a test in `tests/internals/test_torch_internals.py` that fails if a new version lacks the name.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed import HashStore, _register_comm_hook  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store, _get_default_store, _world
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _MultiProcessingDataLoaderIter,
    _SingleProcessDataLoaderIter,
)

_version_of = attrgetter("_version")


class AroundOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which a function is called in place of every torch operator of this thread.

    Args:
        around: called with the name of the operator, such as `aten.mm` or `c10d.allreduce_`, and a function that calls
            it; returns the result.
    """

    def __init__(self, around: Callable[[str, Callable[[], Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._around = around

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for each operator."""
        return self._around(str(func.overloadpacket), lambda: func(*args, **(kwargs or {})))


def version_counter(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place, except through `.data` and in inference mode."""
    return 0 if tensor.is_inference() else int(tensor._version)


def version_counters(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the `version_counter` of each tensor; a fifth of the time for many tensors."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:
        return [version_counter(tensor) for tensor in tensors]


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """Apply a function to every tensor in nested data; containers are copied, other leaves are kept."""
    return tree_map_only(torch.Tensor, function, data)


def leaves_of(data: Any) -> list[Any]:
    """Return the leaves of nested containers; the object itself if it is not a container."""
    return list(tree_leaves(data))


def index_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that a loader iterates over."""
    return loader._index_sampler


def vars_in_mro(cls: type, name: str) -> Any:
    """Return a class attribute without invoking descriptors."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    raise AttributeError(f"{cls.__name__} has no {name}")


def is_map_style(loader: DataLoader[Any]) -> bool:
    """Return whether a loader reads its dataset by index."""
    return int(loader._dataset_kind) == 0


def set_batches_yielded(iterator: Any, count: int) -> None:
    """Set the number of batches that a loader's iterator has already returned."""
    iterator._num_yielded = count


def has_own_iteration(loader_class: type) -> bool:
    """Return whether a loader's class creates iterators differently from `DataLoader`."""
    return any(vars_in_mro(loader_class, name) is not vars(DataLoader)[name] for name in ("__iter__", "_get_iterator"))


def is_own_iterator(iterator: Any) -> bool:
    """Return whether an iterator is one of torch's own loader iterators."""
    return isinstance(iterator, _BaseDataLoaderIter)


def wrap_fetch(iterator: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
    """Wrap an iterator's fetch of the next batch without creating a reference cycle."""
    own = weakref.WeakMethod(iterator._next_data)

    def fetch() -> Any:
        method = own()
        assert method is not None
        return method()

    iterator._next_data = wrap(fetch)


def pin(data: Any) -> Any:
    """Return a batch with pinned copies of all tensors."""
    return pin_memory(data)  # type: ignore[no-untyped-call]


class RotatedWorkersIterator(_MultiProcessingDataLoaderIter):
    """A multiprocessing iterator whose first batch is prepared by a given worker.

    Args:
        loader: the loader to iterate over.
        rotation: index of the worker that prepares the first batch; later epochs begin with worker 0 again.
    """

    def __init__(self, loader: DataLoader[Any], rotation: int) -> None:
        self._rotation = rotation
        super().__init__(loader)

    def _try_put_index(self) -> None:
        while self._rotation:
            next(self._worker_queue_idx_cycle)
            self._rotation -= 1
        super()._try_put_index()


class _LoaderView:
    """A view of a loader for its iterators, with some attributes replaced."""

    def __init__(self, loader: DataLoader[Any], instead: Mapping[str, Any]) -> None:
        self.__dict__.update(instead)
        self.__dict__["_viewed"] = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)


def make_iterator(loader: DataLoader[Any], sampler: Any, rotation: int, instead: Mapping[str, Any]) -> Any:
    """Create an iterator like `DataLoader.__iter__`, with some attributes of the loader replaced.

    Args:
        loader: loader, which is not changed except for the iterator that it keeps for persistent workers.
        sampler: sampler to iterate over.
        rotation: index of the worker that prepares the first batch.
        instead: further attributes to replace, by name.
    """
    view: Any = _LoaderView(loader, {**instead, "_index_sampler": sampler})
    is_persistent = loader.persistent_workers and loader.num_workers > 0
    if is_persistent and loader._iterator is not None:
        loader._iterator._reset(view)
        return loader._iterator
    if loader.num_workers == 0:
        return _SingleProcessDataLoaderIter(view)
    loader.check_worker_number_rationality()
    iterator = RotatedWorkersIterator(view, rotation)
    if is_persistent:
        loader._iterator = iterator
    return iterator


@contextmanager
def watching_inner_iterators(loader: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> Iterator[None]:
    """Wrap the fetches of iterators that a loader's own `__iter__` creates in this context."""
    make = loader._get_iterator

    def make_watched() -> Any:
        iterator = make()
        if is_own_iterator(iterator):
            wrap_fetch(iterator, wrap)
        return iterator

    vars(loader)["_get_iterator"] = make_watched
    try:
        yield
    finally:
        del vars(loader)["_get_iterator"]


def parameter_dicts(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the live dictionaries of a module's own parameters and buffers."""
    return module._parameters, module._buffers


def child_dict(module: torch.nn.Module) -> dict[str, Any]:
    """Return the live dictionary of a module's own children."""
    return module._modules


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """Return the functions that are called before or after the forward or backward pass of a module."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def gradient_hooks(tensor: torch.Tensor) -> int:
    """Return how many functions are called with the gradient of a tensor before it is accumulated."""
    return len(tensor._backward_hooks or ())


def start_tails(workers: Any) -> None:
    """Start the threads that print what an elastic context's workers write to their log files."""
    for tail in _tails_since_2_10(workers) if hasattr(workers, "_tail_logs") else _tails_until_2_9(workers):
        tail.start()


def _tails_since_2_10(workers: Any) -> list[Any]:
    return list(workers._tail_logs)


def _tails_until_2_9(workers: Any) -> list[Any]:
    return [workers._stdout_tail, workers._stderr_tail]


def is_this_machine(host: str) -> bool:
    """Return whether an elastic rendezvous considers a host name or address to be this host."""
    return bool(_matches_machine_hostname(host))


def forbid_restarts(agent: Any) -> None:
    """Make an elastic agent fail at the next failure of a worker."""
    agent._remaining_restarts = 0


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source to its target in one call, which releases the interpreter lock once instead of per tensor."""
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=non_blocking)


def finished_work() -> Any:
    """Return a completed `Work` object, as the result of a collective."""
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


def process_groups() -> list[Any]:
    """Return the process groups of this process, the default one first."""
    return list(_world.pg_map)


def store_of_ranks() -> Store:
    """Return the store in which the ranks of the default process group have met."""
    return _get_default_store()


def restart_group_names() -> None:
    """Make torch name the next process groups as in a new process, as peers look up these names in the store.

    torch numbers the groups of a process, including those whose creation failed, and restarts only when a default group
    is destroyed. A rank whose default group was aborted during its creation would keep its count.
    """
    assert not _world.pg_map, "there are process groups, whose names would be given twice"
    _world.group_count = 0


@contextmanager
def unchanged_excepthook(*, enabled: bool = True) -> Iterator[None]:
    """Preserve `sys.excepthook`, which torch wraps again for each default process group.

    Args:
        enabled: whether to preserve it.
    """
    before = sys.excepthook
    yield
    if enabled:
        sys.excepthook = before


def open_fake_groups(rank: int, world_size: int) -> None:
    """Create a default process group that does not communicate."""
    # Before torch 2.9, such groups must be registered and need a store.
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    store = HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=world_size)


def abort_device_groups() -> int:
    """Abort all device communicators, so that pending collectives fail. gloo's method of that name does nothing.

    Returns:
        Number of communicators.
    """
    count = 0
    for group in process_groups():
        for device_type in group._device_types:
            backend = None if device_type.type == "cpu" else group._get_backend(device_type)
            # Before torch 2.9, a fake backend has no name.
            is_fake = type(backend).__name__ == "FakeProcessGroup"
            if backend is not None and not is_fake and backend.name() != "gloo" and hasattr(backend, "abort"):
                backend.abort()
                count += 1
    return count


def cuda_was_lost_by_fork() -> bool:
    """Return whether this process cannot use CUDA, because it was forked from one that had used it."""
    return bool(torch.cuda._is_in_bad_fork())


def use_process_group(model: Any, group: Any) -> None:
    """Make a DDP model use another process group, and reset it after an interrupted backward pass."""
    model._update_process_group(group)


_UNUSED_PARAMETERS = "Expected to have finished reduction in the prior iteration"


def settle_buckets(model: Any) -> bool:
    """Rebuild the gradient buckets now, as the next forward pass would.

    torch does this once, in the second forward pass of a process, in the order in which the first backward pass
    produced the gradients. All ranks must call it together; the order of rank 0 is used.

    Returns:
        Whether the buckets have been rebuilt, now or before. They cannot be while a parameter has no gradient, which
        the next forward pass refuses, if there is one.
    """
    try:
        if not model._has_rebuilt_buckets and model.reducer._rebuild_buckets():
            model._has_rebuilt_buckets = True
    except RuntimeError as error:
        if _UNUSED_PARAMETERS not in str(error):
            raise
    return bool(model._has_rebuilt_buckets)


def bucket_layout(model: Any) -> list[list[int]]:
    """Return the parameters of each bucket by index among all parameters, as `requires_grad` may have changed since."""
    indices = {id(parameter): index for index, parameter in enumerate(model.module.parameters())}
    buckets = model.reducer._get_zeros_like_grad_buckets()
    return [[indices[id(parameter)] for parameter in bucket.parameters()] for bucket in buckets]


def has_sparse_gradients(model: torch.nn.Module) -> bool:
    """Return whether a model has sparse gradients, whose buckets torch does not list."""
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return any(isinstance(module, embeddings) and module.sparse for module in model.modules())


def set_bucket_layout(model: Any, layout: list[list[int]]) -> None:
    """Set the buckets of a model; registered communication hooks are kept.

    A ring of three or more ranks adds the parts of a bucket in an order that depends on their positions, so different
    buckets give different rounding errors.
    """
    summed = sorted(index for bucket in layout for index in bucket)
    with _wanting_gradients(list(model.module.parameters()), frozenset(summed)):
        number = {index: number for number, index in enumerate(summed)}
        _set_reducer(model, [[number[index] for index in bucket] for bucket in layout])


@contextmanager
def _wanting_gradients(parameters: list[torch.nn.Parameter], indices: Collection[int]) -> Iterator[None]:
    """Set `requires_grad` for exactly these parameters, as when the model was wrapped."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(index in indices)
        yield
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)


def _set_reducer(model: Any, layout: list[list[int]]) -> None:
    parameters, expect_sparse = model._build_params_for_reducer()

    def as_given(_: Any, limits: list[int], *__: Any) -> tuple[list[list[int]], list[int]]:
        return layout[::-1], [limits[-1]] * len(layout)

    # The arguments of a reducer differ between versions of torch, so let torch create it, with our buckets.
    maker: Any = torch.distributed
    compute = maker._compute_bucket_assignment_by_size
    maker._compute_bucket_assignment_by_size = as_given
    try:
        names = model._build_debug_param_to_name_mapping(parameters)
        model._ddp_init_helper(parameters, expect_sparse, names, model.static_graph)
    finally:
        maker._compute_bucket_assignment_by_size = compute
    model._has_rebuilt_buckets = False
    for hook, state in model._comm_hooks:
        _register_comm_hook(model.reducer, state, hook)
    if model.static_graph:
        model.static_graph = False
        model._set_static_graph()


def storage_bytes(storage: Any) -> tuple[bytes, torch.dtype | None, str]:
    """Return the bytes of a storage, its dtype (None if untyped), and its device type."""
    dtype = storage.dtype if isinstance(storage, torch.TypedStorage) else None
    untyped = storage._untyped_storage if isinstance(storage, torch.TypedStorage) else storage
    data = torch.empty(0, dtype=torch.uint8).set_(untyped.cpu()).numpy().tobytes()
    return data, dtype, untyped.device.type


def storage_of(data: torch.Tensor, dtype: torch.dtype | None) -> Any:
    """Rebuild a storage from the results of `storage_bytes`.

    Args:
        data: bytes of the storage, as uint8.
        dtype: dtype of the storage; None if untyped.
    """
    untyped = data.untyped_storage()
    return untyped if dtype is None else torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def storage_place(relative_path: str, offset: int, length: int) -> Any:
    """Build the record of where torch.distributed.checkpoint has stored an entry."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415 - takes half a second

    return _StorageInfo(relative_path, offset, length)
