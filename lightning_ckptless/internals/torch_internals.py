"""Every private torch name that lightning_ckptless touches, and nothing else.

Each has a test in `tests/internals/test_torch_internals.py` that fails loudly when a new version moves it.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed import HashStore, _register_comm_hook  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _world
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _MultiProcessingDataLoaderIter,
    _SingleProcessDataLoaderIter,
)

_T = TypeVar("_T")


def version_counter(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; writes through `.data` are not counted, nor those in inference mode."""
    return 0 if tensor.is_inference() else int(tensor._version)


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """Nested data with a function applied to every tensor in it; containers are made anew, other leaves stay."""
    return tree_map_only(torch.Tensor, function, data)


def leaves_of(data: Any) -> list[Any]:
    """What lies in nested containers; the thing itself where it is none."""
    return list(tree_leaves(data))


def index_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler that drives a loader."""
    return loader._index_sampler


def vars_in_mro(cls: type, name: str) -> Any:
    """A class attribute as it was defined, not as it is read."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    raise AttributeError(f"{cls.__name__} has no {name}")


def is_map_style(loader: DataLoader[Any]) -> bool:
    """Whether the loader asks its dataset by index."""
    return int(loader._dataset_kind) == 0


def set_batches_yielded(iterator: Any, count: int) -> None:
    """Tell a loader's iterator how many batches were handed out before it was made."""
    iterator._num_yielded = count


def has_own_iteration(loader_class: type) -> bool:
    """Whether a loader's class makes iterators in another way than `DataLoader`."""
    return any(vars_in_mro(loader_class, name) is not vars(DataLoader)[name] for name in ("__iter__", "_get_iterator"))


def is_own_iterator(iterator: Any) -> bool:
    """Whether an iterator is one of torch's own over a loader."""
    return isinstance(iterator, _BaseDataLoaderIter)


def wrap_fetch(iterator: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
    """Put a function around an iterator's fetch of the next batch, without making the iterator refer to itself."""
    own = weakref.WeakMethod(iterator._next_data)

    def fetch() -> Any:
        method = own()
        assert method is not None
        return method()

    iterator._next_data = wrap(fetch)


def pin(data: Any) -> Any:
    """Pinned copies of all tensors in a batch."""
    return pin_memory(data)  # type: ignore[no-untyped-call]


class RotatedWorkersIterator(_MultiProcessingDataLoaderIter):
    """Worker processes of a loader, of which the first batch goes to another one than the first.

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
    """A loader as its iterators read it, with some attributes exchanged."""

    def __init__(self, loader: DataLoader[Any], instead: Mapping[str, Any]) -> None:
        self.__dict__.update(instead)
        self.__dict__["_viewed"] = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)


def make_iterator(loader: DataLoader[Any], sampler: Any, rotation: int, instead: Mapping[str, Any]) -> Any:
    """An iterator as `DataLoader.__iter__` makes it, which reads some attributes of the loader elsewhere.

    Args:
        loader: stays as it is, but for the iterator that it keeps where its workers are persistent.
        sampler: drives the iterator.
        rotation: index of the worker that prepares the first batch.
        instead: further attributes by name.
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
    """Put a function around the fetches of the iterators that a loader makes of itself meanwhile."""
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
    """A module's own parameters and buffers, as the live dictionaries that assignments go into."""
    return module._parameters, module._buffers


def start_tails(workers: Any) -> None:
    """Start the threads that show what an elastic context's workers write to their log files."""
    for tail in _tails_since_2_10(workers) if hasattr(workers, "_tail_logs") else _tails_until_2_9(workers):
        tail.start()


def _tails_since_2_10(workers: Any) -> list[Any]:
    return list(workers._tail_logs)


def _tails_until_2_9(workers: Any) -> list[Any]:
    return [workers._stdout_tail, workers._stderr_tail]


def forget_worker_store(handler: Any) -> None:
    """Have an elastic rendezvous make a new store for the workers of its next round.

    It would hand the same store to every round: the keys of the dead are still in it, and an agent that comes later
    waits for an address that is not published again.
    """
    handler._bootstrap_store_info = None
    handler._shared_tcp_store_server = None


def rendezvous_state_to_json(pickled: bytes) -> bytes:
    """The state of an elastic rendezvous as data.

    Args:
        pickled: as torch elastic has pickled it in this process; nothing from elsewhere.
    """
    state: _RendezvousState = pickle.loads(pickled)
    fields = {
        "round": state.round,
        "complete": state.complete,
        "deadline": None if state.deadline is None else state.deadline.isoformat(),
        "closed": state.closed,
        "participants": [[_node_fields(node), rank] for node, rank in state.participants.items()],
        "wait_list": [_node_fields(node) for node in sorted(state.wait_list)],
        "redundancy_list": [_node_fields(node) for node in sorted(state.redundancy_list)],
        "last_heartbeats": [[_node_fields(node), at.isoformat()] for node, at in state.last_heartbeats.items()],
    }
    assert fields.keys() == vars(state).keys(), f"a rendezvous state with the fields {sorted(vars(state))}"
    return json.dumps(fields).encode()


def _node_fields(node: _NodeDesc) -> list[Any]:
    return [node.addr, node.pid, node.local_id]


def rendezvous_state_from_json(text: bytes) -> bytes:
    """The state of an elastic rendezvous as torch elastic pickles it, from data that anyone may have written.

    Raises:
        ValueError: it is no such state.
    """
    try:
        fields = json.loads(text)
        state = _RendezvousState()
        state.round = _of_type(int, fields["round"])
        state.complete = _of_type(bool, fields["complete"])
        state.closed = _of_type(bool, fields["closed"])
        state.deadline = None if fields["deadline"] is None else _time(fields["deadline"])
        state.participants = {_node_of(node): _of_type(int, rank) for node, rank in fields["participants"]}
        state.wait_list = {_node_of(node) for node in fields["wait_list"]}
        state.redundancy_list = {_node_of(node) for node in fields["redundancy_list"]}
        state.last_heartbeats = {_node_of(node): _time(at) for node, at in fields["last_heartbeats"]}
    except (TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"no state of a rendezvous: {error!r}") from error
    return pickle.dumps(state)


def _node_of(fields: Any) -> _NodeDesc:
    addr, pid, local_id = fields
    return _NodeDesc(_of_type(str, addr), _of_type(int, pid), _of_type(int, local_id))


def _time(text: Any) -> datetime:
    at = datetime.fromisoformat(_of_type(str, text))
    if at.tzinfo is None:
        raise ValueError(f"a time without a time zone: {text!r}")
    return at


def _of_type(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def is_this_machine(host: str) -> bool:
    """Whether a host name or address means this machine, as an elastic rendezvous decides it."""
    return bool(_matches_machine_hostname(host))


def forbid_restarts(agent: Any) -> None:
    """Have an elastic agent give up at the next failure."""
    agent._remaining_restarts = 0


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its target, in one call that gives up the interpreter lock once, not once per tensor."""
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=non_blocking)


def finished_work() -> Any:
    """What a collective returns that has nothing to wait for."""
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


def process_groups() -> list[Any]:
    """The process groups of this process, the default one first."""
    return list(_world.pg_map)


def restart_group_names() -> None:
    """Name the next process groups as a new process would, which is what peers look for in the store.

    torch numbers the groups of a process, those that could not be made included, and starts again only when a default
    group is destroyed. A rank whose default group was cut while it was being made would keep its count.
    """
    assert not _world.pg_map, "there are process groups, whose names would be given twice"
    _world.group_count = 0


@contextmanager
def unchanged_excepthook(*, enabled: bool = True) -> Iterator[None]:
    """Keep `sys.excepthook` as it is: torch wraps it again for each default process group of a process.

    Args:
        enabled: whether to.
    """
    before = sys.excepthook
    yield
    if enabled:
        sys.excepthook = before


def open_fake_groups(rank: int, world_size: int) -> None:
    """Make a default process group that sends nothing."""
    # Before torch 2.9 such groups have to be registered, and given a store.
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    store = HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=world_size)


def abort_device_groups() -> int:
    """Abort every communicator of a device: what waits in one fails. gloo's call of that name does nothing.

    Returns:
        How many there are.
    """
    count = 0
    for group in process_groups():
        for device_type in group._device_types:
            backend = None if device_type.type == "cpu" else group._get_backend(device_type)
            # One that sends nothing has no name before torch 2.9.
            is_fake = type(backend).__name__ == "FakeProcessGroup"
            if backend is not None and not is_fake and backend.name() != "gloo" and hasattr(backend, "abort"):
                backend.abort()
                count += 1
    return count


def cuda_was_lost_by_fork() -> bool:
    """Whether this process was forked from one that had asked CUDA for something: it cannot use CUDA then."""
    return bool(torch.cuda._is_in_bad_fork())


def use_process_group(model: Any, group: Any) -> None:
    """Let a wrapped model sum its gradients in another process group, and forget a backward pass that was cut off."""
    model._update_process_group(group)


_UNUSED_PARAMETERS = "Expected to have finished reduction in the prior iteration"


def settle_buckets(model: Any) -> bool:
    """Divide the gradients into the buckets that the next forward pass would divide them into.

    torch does it once, in the second forward pass of a process, in the order in which the first backward pass has made
    the gradients. All ranks must call it together: rank 0's order counts.

    Returns:
        Whether it has been done, now or before. It is not where a parameter has no gradient: the next forward pass
        refuses that, if there is one.
    """
    try:
        if not model._has_rebuilt_buckets and model.reducer._rebuild_buckets():
            model._has_rebuilt_buckets = True
    except RuntimeError as error:
        if _UNUSED_PARAMETERS not in str(error):
            raise
    return bool(model._has_rebuilt_buckets)


def bucket_layout(model: Any) -> list[list[int]]:
    """Which parameters share a bucket, by their places among all: those that want gradients now may be others."""
    places = {id(parameter): place for place, parameter in enumerate(model.module.parameters())}
    buckets = model.reducer._get_zeros_like_grad_buckets()
    return [[places[id(parameter)] for parameter in bucket.parameters()] for bucket in buckets]


def set_bucket_layout(model: Any, layout: list[list[int]]) -> None:
    """Give a model new buckets; hooks of communication that were registered stay.

    A ring of three ranks or more adds the parts of a bucket in an order that depends on where in it they lie, so that
    other buckets round otherwise.
    """
    summed = sorted(place for bucket in layout for place in bucket)
    with _wanting_gradients(list(model.module.parameters()), frozenset(summed)):
        number = {place: number for number, place in enumerate(summed)}
        _set_reducer(model, [[number[place] for place in bucket] for bucket in layout])


@contextmanager
def _wanting_gradients(parameters: list[torch.nn.Parameter], places: Collection[int]) -> Iterator[None]:
    """Let those parameters want gradients, and no others, as they did when the model was wrapped."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for place, parameter in enumerate(parameters):
            parameter.requires_grad_(place in places)
        yield
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)


def _set_reducer(model: Any, layout: list[list[int]]) -> None:
    parameters, expect_sparse = model._build_params_for_reducer()

    def as_given(_: Any, limits: list[int], *__: Any) -> tuple[list[list[int]], list[int]]:
        return layout[::-1], [limits[-1]] * len(layout)

    # What a reducer is given differs between versions of torch, so torch makes it: with our buckets for its own.
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
    """The bytes of a tensor, the dtype that they are seen as (None for none), and their kind of device."""
    dtype = storage.dtype if isinstance(storage, torch.TypedStorage) else None
    untyped = storage._untyped_storage if isinstance(storage, torch.TypedStorage) else storage
    data = torch.empty(0, dtype=torch.uint8).set_(untyped.cpu()).numpy().tobytes()
    return data, dtype, untyped.device.type


def storage_of(data: torch.Tensor, dtype: torch.dtype | None) -> Any:
    """What `storage_bytes` has taken apart.

    Args:
        data: its bytes, as uint8.
        dtype: that they are seen as; None for none.
    """
    untyped = data.untyped_storage()
    return untyped if dtype is None else torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def storage_place(relative_path: str, offset: int, length: int) -> Any:
    """Where torch.distributed.checkpoint has put an entry."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415 - takes half a second

    return _StorageInfo(relative_path, offset, length)
