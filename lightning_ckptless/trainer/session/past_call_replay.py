"""Recording what a trainer call leaves behind, and replaying the call in a later process.

A replayed call is entered again, so that the script finds the objects that the hooks around the loop create: `setup`,
`configure_model`, the dataloader hooks, `on_fit_start`, `on_fit_end` and `teardown` run. The loop itself does not run.
Instead the trainer, model, callbacks, datamodule and random number generators are set to their state at the end of the
loop, and the call returns its recorded result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ckptless import environment
from lightning_ckptless.durable.capture import newest_committed
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning import log_files as host_loggers
from lightning_ckptless.internals.lightning.calls import (
    around_stage,
    ends_call,
    evaluation_counters,
    loader_of_stage,
    rate_finders,
    set_evaluation_counters,
    set_up_data_of_stage,
    without_checkpoint,
    without_synchronization,
)
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.override import Override, remove_overrides
from lightning_ckptless.internals.lightning.versions import without_beginning
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.layout.layout import live_views, local_name, pieces_for, slot_views
from lightning_ckptless.replica.restore import fill
from lightning_ckptless.trainer.data.hooks import DataHooks, Records
from lightning_ckptless.trainer.data.loader import make_resumable
from lightning_ckptless.trainer.data.position import apply_attributes, attributes_now
from lightning_ckptless.trainer.data.sampler_replay import sampler_parts
from lightning_ckptless.trainer.outputs.loggers import RunLoggers
from lightning_ckptless.trainer.recovery.restoration import restore_structure
from lightning_ckptless.trainer.session.past_calls import Record
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.layout_tensors import digest_of, make_room
from lightning_ckptless.trainer.state.rng import apply_rng, owned_generators, set_owned_generators
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.state.tensors import StateIndex

Base = tuple[str, int, int, bool]
"""Identifies the version that contains the tensors a record leaves out: arena, generation, optimizer step, and whether
it includes the validation phase."""
_NO_LONGER_USED = ("buffers_are_due", "buckets")
"""Entries about the wrapped model, which every call creates again."""


# ---------------------------------------------------------------------- recording


def record_fit(trainer: Any, host_state: HostState, hooks: Records, arena: Arena | None) -> Record:
    """Record what a call of `fit` leaves behind, after its loop has ended and its last version is committed.

    Args:
        trainer: trainer in the stage of the call.
        host_state: captures the trainer's host state.
        hooks: records of the dataloader hooks.
        arena: arena with the last version, whose tensors are left out of the record; None if it may no longer exist.
    """
    loops, tensors = FitLoops(trainer), StateIndex(trainer).read()
    base, same = (None, set[str]()) if arena is None else _as_in_arena(arena, tensors, trainer.global_rank)
    loaders = [*_loaders(loops.combined_loader), *_loaders(loops.validation_loader)]
    return _record(
        trainer, host_state, tensors, same, loaders, base=base, hooks=hooks,
        attributes=None if loops.combined_loader is None else attributes_now(loops),
    ) | {"found": [finder.optimal_lr for finder in rate_finders(trainer)]}  # fmt: skip


def record_evaluation(trainer: Any, host_state: HostState, before: Mapping[str, str]) -> Record:
    """Record what a call of `validate`, `test` or `predict` leaves behind, after its loop has ended.

    Args:
        trainer: trainer in the stage of the call.
        host_state: captures the trainer's host state; created when the stage began.
        before: digests of the model's tensors before the call; unchanged tensors are not recorded.
    """
    # An evaluation never steps an optimizer.
    tensors = {name: t for name, t in StateIndex(trainer).read().items() if not name.startswith("optimizer/")}
    same = {name for name, tensor in tensors.items() if before.get(name) == digest_of(tensor)}
    return _record(trainer, host_state, tensors, same, _loaders(loader_of_stage(trainer))) | {"described": None}


def digests_of(model: nn.Module | None) -> dict[str, str]:
    """Digests of a model's materialized tensors, by their names in `StateIndex`."""
    if model is None:
        return {}
    tensors: dict[str, Tensor] = {f"parameter/{name}": parameter for name, parameter in model.named_parameters()}
    tensors |= {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    return {name: digest_of(t) for name, t in tensors.items() if not (t.is_meta or nn.parameter.is_lazy(t))}


def _record(
    trainer: Any,
    host_state: HostState,
    tensors: Mapping[str, Tensor],
    same: Collection[str],
    loaders: list[Any],
    *,
    base: Base | None = None,
    hooks: Records | None = None,
    attributes: list[Any] | None = None,
) -> Record:
    private = StateIndex(trainer).private
    different = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in same}
    state = host_state.capture(dict) | dict.fromkeys(_NO_LONGER_USED)
    return {
        "state": pack(state),
        "evaluations": evaluation_counters(trainer),
        "described": {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        "base": base,
        "same": frozenset(same),
        # Rank 0 records for all ranks what is identical on all of them.
        "shared": {n: t for n, t in different.items() if n not in private} if trainer.is_global_zero else {},
        "tensors": {n: t for n, t in different.items() if n in private},
        "generators": [[owned_generators(holder) for holder in _holders(loader)] for loader in loaders],
        "attributes": attributes,
        "hooks": hooks,
    }


def _as_in_arena(arena: Arena, tensors: Mapping[str, Tensor], rank: int) -> tuple[Base | None, set[str]]:
    """The newest version in an arena, and the names of the tensors that still equal its copies."""
    found, views = newest_committed([arena]), list[tuple[str, Tensor, Tensor]]()
    if not isinstance(found, Complete) or (layout := arena.read_layout(found.snapshot.layout)) is None:
        return None, set()
    if not set(layout.held_by(rank)) <= set(tensors):
        return None, set()
    for shard, bulk in _bulks(arena, found).items():
        names = [local_name(piece, rank) for piece in pieces_for(layout, shard, rank)]
        live = live_views(layout, shard, rank, tensors)
        views += zip(names, live, slot_views(layout, shard, bulk, rank=rank), strict=True)
    different = {name for name, live, held in views if not torch.equal(_bytes(live), _bytes(held))}
    return _base(arena, found), {name for name, _, _ in views} - different


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _bulks(arena: Arena, found: Complete) -> dict[int, Tensor]:
    return {kept[0].shard: arena.read_bulk(kept[0]) for kept in map(tuple, found.replicas)}


def _base(arena: Arena, found: Complete) -> Base:
    snapshot = found.snapshot
    version = snapshot.version
    return str(arena.path), snapshot.generation, version.optimizer_step, version.validation_done


def _loaders(combined: Any) -> list[Any]:
    return [] if combined is None else [loader for loader in combined.flattened if isinstance(loader, DataLoader)]


def _holders(loader: DataLoader[Any]) -> list[Any]:
    """Objects that may own generators which a later call draws from."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return [loader, loader.dataset, *sampler_parts(sampler)]


# ---------------------------------------------------------------------- replaying


def replay_call(call: Callable[[], Any], trainer: Any, record: Record, loggers: RunLoggers, *, is_fit: bool) -> Any:
    """Replay a recorded call.

    Args:
        call: enters the call.
        trainer: trainer of the call.
        record: record of the call.
        loggers: loggers of the trainer.
        is_fit: whether it is a call of `fit`.

    Returns:
        What the call returned.
    """
    strategy = trainer.strategy
    loggers.identify(record["loggers"])
    loggers.keep()
    strategy.joins_alone = environment.REGROUPING in os.environ
    events = host_loggers.event_files(trainer.loggers) if trainer.is_global_zero else set()
    run_stage = _in_place_of_fit if is_fit else _in_place_of_evaluation
    with ExitStack() as stack:
        stack.enter_context(strategy.without_engine())
        stack.enter_context(without_checkpoint(trainer))
        stack.enter_context(without_beginning(trainer) if is_fit else without_synchronization(trainer))
        stack.enter_context(around_stage(trainer, lambda _: run_stage(trainer, record)))
        loops = FitLoops(trainer)
        loops.iterate_data_through(make_resumable)
        stack.callback(loops.give_back)
        for finder in rate_finders(trainer) if is_fit else ():
            stack.enter_context(_without_search(trainer, finder, record))
        result, raised = None, record["raised"]
        with suppress(*(() if raised is None else (type(raised),))):
            result = call()
    if trainer.is_global_zero:
        host_loggers.drop_events_beyond(trainer.loggers, events)
    if raised is not None:
        raise raised
    return result


@contextmanager
def _without_search(trainer: Any, finder: Any, record: Record) -> Iterator[None]:
    """Context in which a rate search yields its recorded result; a call that ended with the search ends again."""

    def search(*_: Any) -> None:
        found = record["found"][rate_finders(trainer).index(finder)]
        try:
            if ends_call(finder):
                _in_place_of_fit(trainer, record)
        finally:
            finder.optimal_lr = found

    Override(finder, "lr_find", search)
    try:
        yield
    finally:
        remove_overrides(finder, "lr_find")


def _in_place_of_fit(trainer: Any, record: Record) -> Any:
    loops, host_state = FitLoops(trainer), _host_state(trainer)
    hooks = DataHooks(trainer, loops)
    hooks.begin(lambda: host_state, lambda _: None, is_new=True)
    if record["attributes"] is not None:
        loops.fit.setup_data()
        hooks.make_as(record["hooks"], trainer.strategy.alone)
        apply_attributes(loops, record["attributes"])
    return _leave_as(
        trainer, host_state, record, [*_loaders(loops.combined_loader), *_loaders(loops.validation_loader)]
    )


def _in_place_of_evaluation(trainer: Any, record: Record) -> Any:
    host_state = _host_state(trainer)
    set_up_data_of_stage(trainer)
    return _leave_as(trainer, host_state, record, _loaders(loader_of_stage(trainer)))


def _host_state(trainer: Any) -> HostState:
    surroundings = Surroundings(trainer)
    surroundings.watch_objects()
    return HostState(trainer, trainer.strategy.options, surroundings)


def _leave_as(trainer: Any, host_state: HostState, record: Record, loaders: list[Any]) -> Any:
    state = unpack(record["state"])
    restore_structure(trainer, state)
    _fill(trainer, record)
    host_state.apply(state)
    set_evaluation_counters(trainer, record["evaluations"])
    for loader, saved in zip(loaders, record["generators"], strict=False):
        for holder, generators in zip(_holders(loader), saved, strict=False):
            set_owned_generators(holder, generators)
    apply_rng(state["rng"])
    if record["raised"] is not None:
        raise record["raised"]
    return record["result"]


def _fill(trainer: Any, record: Record) -> None:
    rank = trainer.global_rank
    if record["described"] is not None:
        make_room(trainer, record["described"])
    tensors = StateIndex(trainer).read()
    if record["base"] is not None:
        arena = Arena.attach(Path(record["base"][0]))
        found = newest_committed([arena])
        assert isinstance(found, Complete)
        layout = arena.read_layout(found.snapshot.layout)
        assert layout is not None
        fill(layout, _bulks(arena, found), tensors, rank, leave=set(layout.held_by(rank)) - record["same"])
    with torch.no_grad():
        for name, value in record["tensors"].items():
            tensors[name].copy_(value)
