"""Learning rate schedulers, those included that a hook has put in place of others in training.

A scheduler that was there when training began is in every process, and takes its state. One that came later is part of
the version as a whole, with a reference to its optimizer by number, so that a new process can make it.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import SmallTensorPickler, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.distribution import distribution_of, module

_FIELDS = ("name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict")


class Schedulers:
    """The schedulers of one trainer.

    Args:
        trainer: as its training begins.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._first = list(trainer.lr_scheduler_configs)
        self._built: dict[int, tuple[Any, Packed]] = {}

    @property
    def first(self) -> list[str]:
        """Class names of those that were there when training began."""
        return [type(config.scheduler).__name__ for config in self._first]

    def capture(self) -> list[dict[str, Any]]:
        """The state of each, and of those that came later what they are made of.

        Raises:
            OptionsError: one came later, and cannot be made by a new process.
        """
        return [
            {
                "class": type(config.scheduler).__name__,
                "state": config.scheduler.state_dict(),
                "built": None if self._is_first(place, config) else self._build(config.scheduler),
                "config": {name: getattr(config, name) for name in _FIELDS},
            }
            for place, config in enumerate(self._trainer.lr_scheduler_configs)
        ]

    def apply(self, saved: list[dict[str, Any]]) -> None:
        """Have the schedulers that were captured, with their state; the trainer has begun with the same ones."""
        live = list(self._trainer.lr_scheduler_configs)
        configs = [self._config(place, state, live[place : place + 1]) for place, state in enumerate(saved)]
        self._trainer.lr_scheduler_configs[:] = configs
        for config, state in zip(configs, saved, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state["state"]))

    def _is_first(self, place: int, config: Any) -> bool:
        return place < len(self._first) and config is self._first[place]

    def _config(self, place: int, saved: dict[str, Any], live: list[Any]) -> Any:
        if saved["built"] is None:
            return self._first[place]
        if live and not self._is_first(place, live[0]) and type(live[0].scheduler).__name__ == saved["class"]:
            return live[0]
        scheduler = unpack(saved["built"], lambda number: self._trainer.optimizers[number])
        return _config_class(self._trainer)(scheduler, **saved["config"])

    def _build(self, scheduler: Any) -> Packed:
        known = self._built.get(id(scheduler))
        if known is None or known[0] is not scheduler:
            out = io.BytesIO()
            try:
                _Parts(out, self._trainer.optimizers).dump(scheduler)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise OptionsError(
                    f"rank {self._trainer.global_rank}: {type(scheduler).__name__} became a scheduler at step "
                    f"{self._trainer.global_step}, and a new process could not make it ({error}): return it from "
                    "configure_optimizers(), or give it functions that are defined at the top of a module"
                ) from error
            known = self._built[id(scheduler)] = scheduler, Packed(out.getvalue())
        return known[1]


def _config_class(trainer: Any) -> Any:
    return module(distribution_of(trainer), "utilities.types").LRSchedulerConfig


class _Parts(SmallTensorPickler):
    """Pickles a scheduler with the numbers of its optimizers in their place."""

    def __init__(self, out: io.BytesIO, optimizers: list[Any]) -> None:
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self._optimizers = optimizers

    def persistent_id(self, value: Any) -> int | None:
        """The number of an optimizer."""
        if not isinstance(value, torch.optim.Optimizer):
            return None
        for number, optimizer in enumerate(self._optimizers):
            if value is optimizer:
                return number
        raise pickle.PicklingError("it has an optimizer that the trainer has not")
