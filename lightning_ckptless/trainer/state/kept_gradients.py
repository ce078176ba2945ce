"""Gradients that a script keeps over an optimizer step, to accumulate those of the next step onto them.

Usually they are dropped or zeroed before the next backward pass, so no version needs them. This is observed: if an
optimizer steps with a gradient that was there at the last version, and was not zero before any backward pass since,
gradients are kept, and are captured from then on. The first version that has gradients contains them, since nothing is
known by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.trainer.state.plain_values import HEAVY_BYTES

_SAMPLES = 8
"""Parameters of each optimizer that are observed."""
_MOST_LOOKS = 16
"""Versions whose gradients are looked at for zeros, which on a device waits for it."""
_Sample = tuple[Tensor, "weakref.ref[Tensor]"]
"""A parameter, and its gradient at the last version."""


class KeptGradients:
    """Observes and captures the gradients of a model.

    Args:
        model: the model.
        optimizers: its optimizers.
        tell: called if gradients are kept that cannot be captured.
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tell: Callable[[], None] = lambda: None
    ) -> None:
        self._model = model
        self._tell = tell
        self._are_kept: bool | None = None
        self._looks = 0
        self._samples = {id(optimizer): _samples_of(optimizer) for optimizer in optimizers}
        self._old: dict[int, list[_Sample]] = {}
        for optimizer in optimizers:
            weakref.finalize(self, _call_after_step(optimizer, weakref.WeakMethod(self._after_step)))

    def capture(self) -> dict[str, Tensor] | None:
        """Return the gradients by parameter if the next step may use them, else None. They are live."""
        self._old = {index: old for index, samples in self._samples.items() if (old := _with_gradients(samples))}
        if self._are_kept is False:
            return None
        found = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        are_whole = all(type(gradient) is Tensor for gradient in found.values())
        if are_whole and sum(gradient.nbytes for gradient in found.values()) <= HEAVY_BYTES:
            return found or None
        if self._are_kept:
            self._tell()
        return None

    def before_backward(self) -> None:
        """Forget the gradients of the last version that were dropped or zeroed."""
        if self._are_kept or not self._old:
            return
        self._old = {index: _still_there(old) for index, old in self._old.items()}
        if any(self._old.values()):
            self._looks += 1
            looks = self._looks <= _MOST_LOOKS
            self._old = {index: list(filter(_is_not_zero, old)) if looks else [] for index, old in self._old.items()}

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (old := self._old.pop(id(optimizer), None)) is None:
            return
        if _still_there(old):
            self._are_kept = True
        elif self._are_kept is None:
            self._are_kept = False


def _with_gradients(samples: Iterable[Tensor]) -> list[_Sample]:
    return [(parameter, weakref.ref(parameter.grad)) for parameter in samples if parameter.grad is not None]


def _still_there(old: Iterable[_Sample]) -> list[_Sample]:
    return [sample for sample in old if (now := sample[0].grad) is not None and now is sample[1]()]


def _is_not_zero(sample: _Sample) -> bool:
    gradient = sample[0].grad
    return gradient is not None and bool(gradient.any())


def _samples_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return parameters[:: max(1, len(parameters) // _SAMPLES)]


def _call_after_step(optimizer: torch.optim.Optimizer, method: Callable[[], Any]) -> Callable[[], None]:
    def called(stepped: Any, *_: Any) -> None:
        if (bound := method()) is not None:
            bound(stepped)

    return optimizer.register_step_post_hook(called).remove
