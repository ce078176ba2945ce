"""The tensor state: every tensor of the training state by its name.

Parameters, optimizer state and the modules that callbacks keep (averaged weights) are the same on all ranks under
data parallelism: *replicated*, divided over the ranks. Where they are sharded, each rank has its part. Buffers, those
of averaged models too, are each rank's own, as batch statistics differ until the next broadcast: *private*, kept whole
by every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import cache
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


class StateIndex:
    """Where the large tensors are, found once and read at every step.

    A parameter, buffer or optimizer tensor may be replaced by another object at any time (`module.buffer = ...`), so
    what is kept is its place, not the tensor.

    Args:
        trainer: its strategy is set up.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._sharded = sharded_modules(trainer.lightning_module)
        reshard(self._sharded)
        self._places: list[tuple[str, dict[Any, Any], Any]] = []
        self._private: list[str] = []
        self._buffers: list[dict[str, Any]] = []
        self._watched_alone = alone_parameters(trainer)
        note_trained_alone(trainer, self._watched_alone)
        self._add_module("", trainer.lightning_module)
        for prefix, extra in callback_modules(trainer):
            self._add_module(f"{prefix}/", extra)
        self._fixed = {name: tensor for name, tensor in optimizer_tensors(trainer) if name.endswith("/value")}
        self._present = self._present_now()
        self._add_optimizers()
        self._shardings = {name: _sharding(tensor) for name, tensor in self.tensors().items()}

    @property
    def private(self) -> frozenset[str]:
        """Names of the tensors that are each rank's own; the forward pass may change them."""
        return frozenset(self._private)

    @property
    def untrained(self) -> frozenset[str]:
        """Names of parameters that no optimizer changes: frozen ones, and copies that a hook keeps current."""
        trained = {id(p) for optimizer in self.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        named = {name: place[key] for name, place, key in self._places if name.startswith("parameter/")}
        return frozenset(name for name, p in named.items() if not (p.requires_grad and id(p) in trained))

    def is_current(self) -> bool:
        """Whether the tensors that were found are still all that there are."""
        return self._present_now() == self._present

    def refresh(self) -> None:
        """Take what there is beside the tensors for what was found: plain values are put back after them."""
        self._present = self._present_now()

    def read(self) -> dict[str, Tensor]:
        """All large tensors of this rank by name, as they are now; of sharded ones the part that is here.

        Raises:
            LayoutMismatchError: one is sharded otherwise than when it was found; names it.
        """
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                self._require_sharding(name, tensor)
                tensors[name] = local_part(tensor)
        return tensors

    def _require_sharding(self, name: str, tensor: DTensor) -> None:
        shape, placements = self._shardings[name]
        if _sharding(tensor) != (shape, placements):
            raise LayoutMismatchError(
                f"rank {self.trainer.global_rank}: {name} is {list(tensor.shape)} over {tensor.placements} at step "
                f"{self.trainer.global_step}, it was {list(shape)} over {placements} when the state was cut: the "
                "sharding of a model must stay as configure_model() made it"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All large tensors by name, as they are now, sharded ones as such."""
        reshard(self._sharded)
        return {name: place[key] for name, place, key in self._places} | self._fixed

    def keep_only(self, names: Collection[str]) -> None:
        """Drop buffers and optimizer tensors that the trainer has made since a version that it goes back to.

        Optimizers and modules make them anew when they need them, as they did the first time.

        Args:
            names: of the tensors of that version.
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
                        self._private.append(name)

    def _add_optimizers(self) -> None:
        for index, optimizer in enumerate(self.trainer.optimizers):
            for name, parameter in optimizer_parameters(self.trainer, index).items():
                state = optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self._places.append((f"optimizer/{index}/{name}/{key}", state, key))
                        if name in trained_alone(self.trainer):
                            self._private.append(f"optimizer/{index}/{name}/{key}")

    def _present_now(self) -> tuple[Any, ...]:
        buffers = sum(buffer is not None for buffers in self._buffers for buffer in buffers.values())
        # By identity too: loading a state dictionary replaces all of it by as many tensors.
        states = [
            (id(state), len(state))
            for optimizer in self.trainer.optimizers
            for parameter, state in optimizer.state.items()
            if isinstance(parameter, Tensor)
        ]
        groups = [len(group["params"]) for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        alone = sum(parameter.requires_grad for parameter in self._watched_alone.values())
        return buffers, states, groups, alone


def alone_parameters(trainer: Any) -> dict[str, nn.Parameter]:
    """Parameters whose gradients are not summed over the ranks: they were frozen when DDP wrapped the model."""
    summed = summed_parameters(trainer.strategy.model)
    if summed is None:
        return {}
    named = trainer.lightning_module.named_parameters()
    return {name: parameter for name, parameter in named if id(parameter) not in summed}


def trained_alone(trainer: Any) -> set[str]:
    """Names of the parameters that each rank has trained for itself: they are another one on each, from then on."""
    names: set[str] = vars(trainer.strategy).setdefault("ckptless_trained_alone", set())
    return names


def note_trained_alone(trainer: Any, alone: dict[str, nn.Parameter]) -> None:
    """Add those that are trained from now on; says so once."""
    new = {name for name, parameter in alone.items() if parameter.requires_grad} - trained_alone(trainer)
    if new and trainer.is_global_zero:
        log.warning(
            "ckptless: %d parameters (%s, ...) were frozen when DDP wrapped the model and are trained from step %d: "
            "DDP does not sum their gradients, so each rank trains them for itself. For ranks that agree freeze them "
            "when training has begun, with find_unused_parameters=True",
            len(new), min(new), trainer.global_step,
        )  # fmt: skip
    trained_alone(trainer).update(new)


def is_of_optimizer(name: str) -> bool:
    """Whether a tensor is state of an optimizer, which nothing but its step changes; not a parameter that it holds."""
    return name.startswith("optimizer/") and not name.endswith("/value")


def callback_modules(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that callbacks keep beside the model, e.g. averaged weights."""
    own = {id(m) for m in trainer.lightning_module.modules()}
    for index, callback in enumerate(trainer.callbacks):
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and id(value) not in own:
                yield f"callback/{index}.{type(callback).__name__}.{name}", value


def optimizer_parameters(trainer: Any, index: int) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by name; those that the model does not hold are named by their place."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    return {
        names.get(id(parameter), f"#{group_index}.{place}"): parameter
        for group_index, group in enumerate(trainer.optimizers[index].param_groups)
        for place, parameter in enumerate(group["params"])
    }


def optimizer_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all optimizers by name, with those parameters that the model does not hold."""
    for index, optimizer in enumerate(trainer.optimizers):
        for name, parameter in optimizer_parameters(trainer, index).items():
            if name.startswith("#"):
                yield f"optimizer/{index}/{name}/value", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer/{index}/{name}/{key}", value


def require_room(trainer: Any) -> None:
    """Refuse optimizer tensors that `make_room_for_optimizer_state` could not make in a new process.

    Raises:
        OptionsError: one is sharded, and not as its parameter is; names it.
    """
    for index, optimizer in enumerate(trainer.optimizers):
        for name, parameter in optimizer_parameters(trainer, index).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor) and (value.shape, value.placements) != _sharding(parameter):
                    raise OptionsError(
                        f"optimizer {index} ({type(optimizer).__name__}): {key} of {name} is {list(value.shape)} over "
                        f"{value.placements}, the parameter {list(parameter.shape)}: a new process could not make it "
                        "anew. Take an optimizer whose state is sharded as its parameters are, such as AdamW"
                    )


def _sharding(parameter: Tensor) -> tuple[Any, Any]:
    return parameter.shape, parameter.placements if isinstance(parameter, DTensor) else None


def optimizer_facts(trainer: Any) -> list[dict[str, Any]]:
    """What optimizers hold beside large tensors: hyper-parameters of their groups, and plain values."""
    facts = []
    for index, optimizer in enumerate(trainer.optimizers):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        # Most optimizers keep tensors only. Names are looked up for the others: that walks through the whole model.
        states = [state for key, state in optimizer.state.items() if isinstance(key, Tensor)]
        has_plain = not all(isinstance(value, Tensor) for state in states for value in state.values())
        state = _plain_state(trainer, index) if has_plain else {}
        # Some optimizers keep a counter for all parameters beside what they keep for each.
        common = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        facts.append({"groups": groups, "state": state, "common": common, "plain": _own_attributes(optimizer)})
    return facts


def _own_attributes(optimizer: Any) -> dict[str, Any]:
    """What an optimizer that is not torch's keeps beside its state, such as a count of its steps."""
    if type(optimizer).__module__.startswith("torch."):
        return {}
    return plain_attributes(optimizer, leave=attributes_of_all_optimizers())


@cache
def attributes_of_all_optimizers() -> frozenset[str]:
    """Names of what torch and its schedulers keep on any optimizer."""
    scheduled = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 1.0)
    # A scheduler sets that one when the optimizer is called.
    return frozenset(vars(scheduled)) | {"_opt_called"}


def _plain_state(trainer: Any, index: int) -> dict[str, Any]:
    state = trainer.optimizers[index].state
    named = optimizer_parameters(trainer, index).items()
    return {name: plain for name, parameter in named if (plain := _plain_values(state.get(parameter, {})))}


def _plain_values(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def set_optimizer_facts(trainer: Any, saved: list[dict[str, Any]]) -> None:
    """Put back what `optimizer_facts` took. Learning rates live here, not in the schedulers.

    Raises:
        LayoutMismatchError: the script made other optimizers or parameter groups.
    """
    found, expected = ([len(o.param_groups) for o in trainer.optimizers], [len(f["groups"]) for f in saved])
    if found != expected:
        raise LayoutMismatchError(
            f"the mirrored optimizers have {expected} parameter groups, those of the relaunched script {found}: "
            "configure_optimizers() must return the same after a relaunch"
        )
    for index, (optimizer, facts) in enumerate(zip(trainer.optimizers, saved, strict=True)):
        for group, values in zip(optimizer.param_groups, facts["groups"], strict=True):
            _update_group(group, values)
        parameters = optimizer_parameters(trainer, index)
        for name, values in facts["state"].items():
            optimizer.state[parameters[name]].update(values)
        optimizer.state.update(facts["common"])
        set_plain_attributes(optimizer, facts["plain"])


def _update_group(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key in group.keys() - values.keys() - {"params"}:
        # Set since that version, as a scheduler does it that comes in the middle of a run.
        del group[key]
    for key, value in values.items():
        if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
            # A learning rate in a tensor: schedulers and captured graphs hold this very object.
            group[key].copy_(value)
        else:
            group[key] = value


def make_room_for_optimizer_state(trainer: Any, described: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create empty optimizer tensors for a state that a fresh optimizer does not have yet; those that are there stay.

    Args:
        trainer: with its optimizers.
        described: dtype and shape of every optimizer tensor by the name that `named_state` gives it. Names that this
            trainer has no parameter for are left out: comparing the layouts will name them.
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
    """The shapes by which a tensor may be described: that of the whole, and that of the part that is here."""
    return tuple(tensor.shape), tuple(local_part(tensor).shape)


def _room(optimizer: Any, parameter: nn.Parameter, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if shape in _shapes(parameter) and not (key == "step" and not shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # Zero-dimensional counters stay on the host, as optimizers make them unless asked for fused or capturable ones.
    on_host = not shape and not any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    return torch.empty(shape, dtype=dtype, device="cpu" if on_host else parameter.device)


def make_room_for_buffers(trainer: Any, described: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create empty buffers that a fresh model does not have yet, because it makes them when it is first used.

    Args:
        trainer: its model has trained nothing.
        described: dtype and shape of this rank's own tensors by name.
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
