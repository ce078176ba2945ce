"""Learning rate schedulers, including those that a hook adds or replaces in training.

A scheduler that existed when training began exists in every process, and only its state is captured. A later one is
pickled as a whole, with its optimizer referenced by index, so that a new process can create it.
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
        trainer: at the start of training.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._first = list(trainer.lr_scheduler_configs)
        self._built: dict[int, tuple[Any, Packed]] = {}

    @property
    def first(self) -> list[str]:
        """Class names of the schedulers that existed when training began."""
        return [type(config.scheduler).__name__ for config in self._first]

    def capture(self) -> list[dict[str, Any]]:
        """Return the state of each scheduler, with the pickled object for those added later.

        Raises:
            OptionsError: one was added later and cannot be recreated in a new process.
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
        """Restore the captured schedulers and their state; the trainer must have started with the same ones."""
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
                    f"rank {self._trainer.global_rank}: the scheduler {type(scheduler).__name__}, added at step "
                    f"{self._trainer.global_step}, cannot be recreated in a new process ({error}): return it from "
                    "configure_optimizers(), or use functions defined at module level"
                ) from error
            known = self._built[id(scheduler)] = scheduler, Packed(out.getvalue())
        return known[1]


def _config_class(trainer: Any) -> Any:
    return module(distribution_of(trainer), "utilities.types").LRSchedulerConfig


class _Parts(SmallTensorPickler):
    """Pickles a scheduler with its optimizers replaced by their indices."""

    def __init__(self, out: io.BytesIO, optimizers: list[Any]) -> None:
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self._optimizers = optimizers

    def persistent_id(self, value: Any) -> int | None:
        """Return the index of an optimizer; None for other objects."""
        if not isinstance(value, torch.optim.Optimizer):
            return None
        for number, optimizer in enumerate(self._optimizers):
            if value is optimizer:
                return number
        raise pickle.PicklingError("its optimizer is not one of the trainer's")
