"""Modules that a callback adds in training, such as an average of the model that begins with its first batch.

A new process does not run the step that makes such a module, and the module's tensors need a place to be restored to.
So versions contain the module itself, with empty tensors. Modules that exist when training begins are not part of it:
the script makes them in every process.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import SmallTensorPickler, on_device, pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.trainer.state.tensors import modules_of_callbacks

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class AddedModules:
    """The modules of a trainer's callbacks that were made after training began.

    Args:
        trainer: when training begins.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._first = {place for place, *_ in modules_of_callbacks(trainer)}
        self._packed: dict[str, tuple[nn.Module, Packed]] = {}

    def capture(self) -> dict[str, Any]:
        """Return the modules without the values of their tensors.

        Raises:
            OptionsError: one cannot be made in a new process.
        """
        added: dict[str, tuple[int, str, Packed]] = {}
        for place, index, name, module in modules_of_callbacks(self._trainer):
            if place not in self._first:
                if place not in self._packed or self._packed[place][0] is not module:
                    self._packed[place] = module, self._pack(place, module)
                added[place] = index, name, self._packed[place][1]
        return {"first": self._first, "added": added}

    def apply(self, saved: dict[str, Any]) -> None:
        """Take note of which modules were there when training began; `restore_modules` has restored the others."""
        self._first = set(saved["first"])

    def _pack(self, place: str, module: nn.Module) -> Packed:
        out = io.BytesIO()
        try:
            _Empty(out, protocol=pickle.HIGHEST_PROTOCOL).dump(module)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OptionsError(
                f"rank {self._trainer.global_rank}: {place}, which was made in training before step "
                f"{self._trainer.global_step}, cannot be made in a new process ({error}): make it in setup() or "
                "on_fit_start()"
            ) from error
        return Packed(out.getvalue())


def restore_modules(trainer: Any, saved: dict[str, Any]) -> None:
    """Give the callbacks the modules that they had, with any values, and take away those that they have made since.

    Args:
        trainer: its strategy is set up.
        saved: the result of `AddedModules.capture`.
    """
    there = {place: (index, name) for place, index, name, _ in modules_of_callbacks(trainer)}
    for place in there.keys() - saved["first"] - saved["added"].keys():
        index, name = there[place]
        setattr(trainer.callbacks[index], name, None)
    for place, (index, name, packed) in saved["added"].items():
        if place not in there:
            setattr(trainer.callbacks[index], name, unpack(packed))


class _Empty(SmallTensorPickler):
    """Writes only the kind of a tensor."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to write a value."""
        if isinstance(value, torch.Tensor):
            is_parameter = isinstance(value, nn.Parameter)
            return empty_tensor, (tuple(value.shape), value.dtype, value.device.type, is_parameter, value.requires_grad)
        if isinstance(value, nn.Module):
            reduced: Any = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            make, arguments, state, *rest = reduced
            return make, arguments, _with_known_hooks(state), *rest
        return super().reducer_override(value)


def _with_known_hooks(state: Any) -> Any:
    """Return the state of a module without hooks that are local to a function, which came along when it was copied."""
    if not isinstance(state, dict):
        return state
    hooks = {name: held for name, held in state.items() if name in _OF_EVERY_MODULE and "hook" in name and held}
    return state | {
        name: type(held)((key, hook) for key, hook in held.items() if _is_known(hook)) for name, held in hooks.items()
    }


def _is_known(hook: Any) -> bool:
    try:
        pack(hook)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def empty_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, is_parameter: bool, requires_grad: bool
) -> torch.Tensor:
    """Make a tensor of zeros."""
    made = on_device(torch.zeros(shape, dtype=dtype), device)
    return nn.Parameter(made, requires_grad) if is_parameter else made.requires_grad_(requires_grad)
