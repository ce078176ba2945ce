"""The tensor state: every tensor of the training state by name.

Under data parallelism, parameters, optimizer state and modules held by callbacks (averaged weights) are equal on all
ranks: they are *replicated*, and each rank mirrors a part. If they are sharded, each rank has its shard. Buffers,
including those of averaged models, are *private* to each rank, since batch statistics differ until the next broadcast:
every rank mirrors its own in full.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from operator import getitem, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.internals.torch_internals import parameter_dicts
from lightning_ckptless.replica.layout.tensor_spec import local_part
from lightning_ckptless.trainer.state.gradient_buckets import summed_parameters
from lightning_ckptless.trainer.state.plain_values import plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.sharding import reshard, sharded_modules

log = logging.getLogger(__name__)

_VALUES = methodcaller("values")


class StateIndex:
    """Locates the large tensors once, so that they can be read at every step.

    A parameter, buffer or optimizer tensor may be replaced by another object at any time (`module.buffer = ...`), so
    the index keeps where each tensor is stored, not the tensor itself.

    Args:
        trainer: its strategy is set up.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._sharded = sharded_modules(trainer.lightning_module)
        reshard(self._sharded)
        self._places: list[tuple[str, dict[Any, Any], Any]] = []
        self._of_this_rank: list[str] = []
        self._buffers: list[dict[str, Any]] = []
        self._watched_alone = alone_parameters(trainer)
        note_trained_alone(trainer, self._watched_alone)
        self._add_module("", trainer.lightning_module)
        for prefix, extra in callback_modules(trainer):
            self._add_module(f"{prefix}/", extra)
        self._fixed = {name: tensor for name, tensor in optimizer_tensors(trainer) if name.endswith("/value")}
        self._present = self._present_now()
        self._add_optimizers()
        self._private = frozenset(self._of_this_rank)
        self._dicts, self._keys = [place for _, place, _ in self._places], [key for *_, key in self._places]
        self._read: list[Tensor] = []
        self._tensors = self.tensors()
        self._shardings = {name: _sharding(tensor) for name, tensor in self._tensors.items()}

    @property
    def private(self) -> frozenset[str]:
        """Names of the tensors private to each rank; the forward pass may change them."""
        return self._private

    @property
    def untrained(self) -> frozenset[str]:
        """Names of parameters that no optimizer changes: frozen ones, and copies that a hook updates."""
        trained = {id(p) for optimizer in self.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        named = {name: place[key] for name, place, key in self._places if name.startswith("parameter/")}
        return frozenset(name for name, p in named.items() if not (p.requires_grad and id(p) in trained))

    def is_current(self) -> bool:
        """Return whether the index still covers exactly the tensors that exist."""
        return self._present_now() == self._present

    def refresh(self) -> None:
        """Accept the current contents of the optimizer states: plain values are restored after the tensors."""
        self._present = self._present_now()

    def read(self) -> Mapping[str, Tensor]:
        """Return all current large tensors of this rank by name; for sharded tensors, the local part.

        As long as no tensor is replaced, it returns the same mapping again.

        Raises:
            LayoutMismatchError: a tensor's sharding has changed since it was indexed; names it.
        """
        reshard(self._sharded)
        now = list(map(getitem, self._dicts, self._keys))
        if len(now) == len(self._read) and all(map(is_, now, self._read)):
            return self._tensors
        tensors = self._tensors = self.tensors()
        sharded = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
        for name in sharded:
            self._require_sharding(name, tensors[name])
            tensors[name] = local_part(tensors[name])
        # The local part of a sharded tensor may be replaced, so these are read every time.
        self._read = [] if sharded else now
        return tensors

    def _require_sharding(self, name: str, tensor: Any) -> None:
        shape, placements = self._shardings[name]
        if _sharding(tensor) != (shape, placements):
            raise LayoutMismatchError(
                f"rank {self.trainer.global_rank}: {name} is {list(tensor.shape)} over {tensor.placements} at step "
                f"{self.trainer.global_step}, it was {list(shape)} over {placements} when the layout was planned: the "
                "sharding of a model must stay as configure_model() created it"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return all current large tensors by name, sharded ones as `DTensor`."""
        reshard(self._sharded)
        return {name: place[key] for name, place, key in self._places} | self._fixed

    def keep_only(self, names: Collection[str]) -> None:
        """Drop buffers and optimizer tensors created after the version to be restored.

        Optimizers and modules recreate them on demand, as they did the first time.

        Args:
            names: names of the tensors of that version.
        """
        for name, place, key in self._places:
            if name in names:
                continue
            if "buffer/" in name and not name.startswith("optimizer/"):
                place[key] = None
            elif name.startswith("optimizer/"):
                place.pop(key, None)
                if not any(isinstance(value, Tensor) for value in place.values()):
                    place.clear()

    def _add_module(self, prefix: str, module: nn.Module) -> None:
        seen: set[int] = set()
        for path, child in module.named_modules():
            dot = f"{path}." if path else ""
            parameters, buffers = parameter_dicts(child)
            self._buffers.append(buffers)
            for kind, place in (("parameter", parameters), ("buffer", buffers)):
                for key, tensor in place.items():
                    if tensor is None or id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    name = f"{prefix}{kind}/{dot}{key}"
                    self._places.append((name, place, key))
                    if kind == "buffer" or (not prefix and f"{dot}{key}" in trained_alone(self.trainer)):
                        self._of_this_rank.append(name)

    def _add_optimizers(self) -> None:
        for index, optimizer in enumerate(self.trainer.optimizers):
            for name, parameter in optimizer_parameters(self.trainer, index).items():
                state = optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self._places.append((f"optimizer/{index}/{name}/{key}", state, key))
                        if name in trained_alone(self.trainer):
                            self._of_this_rank.append(f"optimizer/{index}/{name}/{key}")

    def _present_now(self) -> tuple[Any, ...]:
        buffers = [buffer is not None for buffers in self._buffers if buffers for buffer in buffers.values()]
        optimizers = self.trainer.optimizers
        # Identities too: loading a state dict replaces everything with the same number of tensors.
        states = [(list(map(id, held)), list(map(len, held))) for held in map(_states_of_tensors, optimizers)]
        groups = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
        alone = sum(parameter.requires_grad for parameter in self._watched_alone.values())
        return sum(buffers), states, groups, alone, [id(module) for _, module in callback_modules(self.trainer)]


def _states_of_tensors(optimizer: Any) -> list[dict[str, Any]]:
    """Return the states of an optimizer's parameters. Some optimizers have a global counter besides them."""
    state = optimizer.state
    if _are_tensors(state):
        return list(state.values())
    return [held for key, held in state.items() if isinstance(key, Tensor)]


def _are_tensors(values: Iterable[Any]) -> bool:
    # To ask every object whether it is an instance of `Tensor` would call a function in Python each time.
    return all(issubclass(kind, Tensor) for kind in set(map(type, values)))


def alone_parameters(trainer: Any) -> dict[str, nn.Parameter]:
    """Return the parameters whose gradients DDP does not reduce because they were frozen when it wrapped the model."""
    summed = summed_parameters(trainer.strategy.model)
    if summed is None:
        return {}
    named = trainer.lightning_module.named_parameters()
    return {name: parameter for name, parameter in named if id(parameter) not in summed}


def trained_alone(trainer: Any) -> set[str]:
    """Return the names of parameters that each rank has trained on its own, so that they differ between ranks."""
    names: set[str] = vars(trainer.strategy).setdefault("ckptless_trained_alone", set())
    return names


def note_trained_alone(trainer: Any, alone: dict[str, nn.Parameter]) -> None:
    """Add the parameters that are trainable from now on, and log a warning once for each."""
    new = {name for name, parameter in alone.items() if parameter.requires_grad} - trained_alone(trainer)
    if new and trainer.is_global_zero:
        log.warning(
            "ckptless: %d parameters (%s, ...) were frozen when DDP wrapped the model and are trained from step %d: "
            "DDP does not reduce their gradients, so each rank trains them on its own. To keep ranks in agreement, "
            "freeze them only after training has started, with find_unused_parameters=True",
            len(new), min(new), trainer.global_step,
        )  # fmt: skip
    trained_alone(trainer).update(new)


def is_of_optimizer(name: str) -> bool:
    """Return whether a tensor is optimizer state, which only a step changes, not a parameter in the optimizer."""
    return name.startswith("optimizer/") and not name.endswith("/value")


def callback_modules(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that callbacks hold outside the model, e.g. averaged weights, with a name prefix."""
    yield from ((place, module) for place, _, _, module in modules_of_callbacks(trainer))


def modules_of_callbacks(trainer: Any) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Yield the same modules, each with its prefix, the index of its callback, and the name of the attribute."""
    own: set[int] = set()
    for index, callback in enumerate(trainer.callbacks):
        attributes = vars(callback)
        if not any(map(_is_module, map(type, attributes.values()))):
            continue
        for name, value in attributes.items():
            if isinstance(value, nn.Module):
                own = own or {id(m) for m in trainer.lightning_module.modules()}
                if id(value) not in own:
                    yield f"callback/{index}.{type(callback).__name__}.{name}", index, name, value


@cache
def _is_module(kind: type) -> bool:
    return issubclass(kind, nn.Module)


def optimizer_parameters(trainer: Any, index: int) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name. Parameters outside the model are named by group and index."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    return {
        names.get(id(parameter), f"#{group_index}.{place}"): parameter
        for group_index, group in enumerate(trainer.optimizers[index].param_groups)
        for place, parameter in enumerate(group["params"])
    }


def optimizer_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all optimizers by name, including parameters that are not in the model."""
    for index, optimizer in enumerate(trainer.optimizers):
        for name, parameter in optimizer_parameters(trainer, index).items():
            if name.startswith("#"):
                yield f"optimizer/{index}/{name}/value", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer/{index}/{name}/{key}", value


def require_room(trainer: Any) -> None:
    """Reject optimizer tensors that `make_room_for_optimizer_state` could not create in a new process.

    Raises:
        OptionsError: a tensor is sharded differently from its parameter; names it.
    """
    for index, optimizer in enumerate(trainer.optimizers):
        for name, parameter in optimizer_parameters(trainer, index).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor) and (value.shape, value.placements) != _sharding(parameter):
                    raise OptionsError(
                        f"optimizer {index} ({type(optimizer).__name__}): {key} of {name} is {list(value.shape)} over "
                        f"{value.placements}, the parameter {list(parameter.shape)}: a new process could not recreate "
                        "it. Use an optimizer whose state is sharded like its parameters, such as AdamW"
                    )


def _sharding(parameter: Tensor) -> tuple[Any, Any]:
    return parameter.shape, parameter.placements if isinstance(parameter, DTensor) else None


def optimizer_facts(trainer: Any) -> list[dict[str, Any]]:
    """Return what optimizers hold besides large tensors: group hyper-parameters and plain values."""
    facts = []
    for index, optimizer in enumerate(trainer.optimizers):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        # Most optimizers keep only tensors. Look up names only for the others, since that walks the whole model.
        states = _states_of_tensors(optimizer)
        has_plain = not _are_tensors(chain.from_iterable(map(_VALUES, states)))
        state = _plain_state(trainer, index) if has_plain else {}
        # Some optimizers keep a global counter in addition to per-parameter state.
        common = {}
        if len(states) < len(optimizer.state):
            common = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        facts.append({"groups": groups, "state": state, "common": common, "plain": _own_attributes(optimizer)})
    return facts


def _own_attributes(optimizer: Any) -> dict[str, Any]:
    """Return the plain attributes of an optimizer that is not torch's own, such as a step counter."""
    if type(optimizer).__module__.startswith("torch."):
        return {}
    return plain_attributes(optimizer, leave=attributes_of_all_optimizers())


@cache
def attributes_of_all_optimizers() -> frozenset[str]:
    """Return the attribute names that torch and its schedulers set on any optimizer."""
    scheduled = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 1.0)
    # A scheduler sets this one when the optimizer steps.
    return frozenset(vars(scheduled)) | {"_opt_called"}


def _plain_state(trainer: Any, index: int) -> dict[str, Any]:
    state = trainer.optimizers[index].state
    named = optimizer_parameters(trainer, index).items()
    return {name: plain for name, parameter in named if (plain := _plain_values(state.get(parameter, {})))}


def _plain_values(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def set_optimizer_facts(trainer: Any, saved: list[dict[str, Any]]) -> None:
    """Restore what `optimizer_facts` returned. Learning rates are part of it, not of the schedulers.

    Raises:
        LayoutMismatchError: the script created different optimizers or parameter groups.
    """
    found, expected = ([len(o.param_groups) for o in trainer.optimizers], [len(f["groups"]) for f in saved])
    if found != expected:
        raise LayoutMismatchError(
            f"the mirrored optimizers have {expected} parameter groups, the relaunched script's have {found}: "
            "configure_optimizers() must return the same after a relaunch"
        )
    for index, (optimizer, facts) in enumerate(zip(trainer.optimizers, saved, strict=True)):
        for group, values in zip(optimizer.param_groups, facts["groups"], strict=True):
            _update_group(group, values)
        _drop_later_values(optimizer, facts)
        parameters = optimizer_parameters(trainer, index)
        for name, values in facts["state"].items():
            optimizer.state[parameters[name]].update(values)
        optimizer.state.update(facts["common"])
        set_plain_attributes(optimizer, facts["plain"])


def _drop_later_values(optimizer: Any, facts: dict[str, Any]) -> None:
    """Delete what the optimizer has created since besides tensors; what was there then is restored."""
    for key in [key for key in optimizer.state if not isinstance(key, Tensor) and key not in facts["common"]]:
        del optimizer.state[key]
    for state in _states_of_tensors(optimizer):
        for key in _plain_values(state):
            del state[key]


def _update_group(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key in group.keys() - values.keys() - {"params"}:
        # Set after that version, e.g. by a scheduler added in the middle of a run.
        del group[key]
    for key, value in values.items():
        if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
            # A tensor learning rate: schedulers and captured graphs hold a reference to this object.
            group[key].copy_(value)
        else:
            group[key] = value


def make_room_for_optimizer_state(trainer: Any, described: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create empty optimizer tensors that a fresh optimizer does not have yet; existing ones are kept.

    Args:
        trainer: with its optimizers.
        described: dtype and shape of every optimizer tensor by its name in `StateIndex`. Names without a parameter in
            this trainer are skipped: the comparison of layouts reports them.
    """
    parameters = [optimizer_parameters(trainer, index) for index in range(len(trainer.optimizers))]
    for name, (dtype, shape) in described.items():
        _, index, rest = name.split("/", 2)
        parameter_name, key = rest.rsplit("/", 1)
        if int(index) >= len(parameters) or parameter_name not in parameters[int(index)]:
            continue
        optimizer, parameter = trainer.optimizers[int(index)], parameters[int(index)][parameter_name]
        if parameter_name.startswith("#") and key == "value":
            continue
        there = optimizer.state[parameter].get(key)
        if not isinstance(there, Tensor) or there.dtype != dtype or shape not in _shapes(there):
            optimizer.state[parameter][key] = _room(optimizer, parameter, key, dtype, shape)


def _shapes(tensor: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the shapes by which a tensor may be described: global and local."""
    return tuple(tensor.shape), tuple(local_part(tensor).shape)


def _room(optimizer: Any, parameter: nn.Parameter, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if shape in _shapes(parameter) and not (key == "step" and not shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # Zero-dimensional counters are on the CPU, where optimizers create them unless fused or capturable.
    on_host = not shape and not any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    return torch.empty(shape, dtype=dtype, device="cpu" if on_host else parameter.device)


def make_room_for_buffers(trainer: Any, described: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create empty buffers that a fresh model does not have yet because it creates them on first use.

    Args:
        trainer: with its model, which has not run yet.
        described: dtype and shape of this rank's private tensors by name.
    """
    model = trainer.lightning_module
    modules = dict(model.named_modules())
    for name, (dtype, shape) in described.items():
        kind, _, place = name.partition("/")
        path, _, key = place.rpartition(".")
        if kind != "buffer" or path not in modules or getattr(modules[path], key, None) is not None:
            continue
        _, buffers = parameter_dicts(modules[path])
        if key not in buffers:
            modules[path].register_buffer(key, None)
        buffers[key] = torch.empty(shape, dtype=dtype, device=model.device)
