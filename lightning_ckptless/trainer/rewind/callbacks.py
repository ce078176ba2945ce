"""Callbacks that request a rewind when the loss is not finite, or jumps.

Each rank watches its own value. A request of one rank is enough, since all ranks decide together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lightning_ckptless.errors import OptionsError


class RewindMixin:
    """Requests a rewind to before the step with a bad value.

    Args:
        metric: name of the value: an entry of what `training_step` returns (`loss` for a single tensor), or else a
            value that was logged with `self.log`.
        steps: number of optimizer steps to go back; 1 undoes the one that used the value.
        skip_batches: batches of each rank to skip from there on; None for all up to the current one.

    Raises:
        OptionsError: a value is out of range.
    """

    def __init__(self, metric: str, steps: int, skip_batches: int | None) -> None:
        if steps < 1:
            raise OptionsError(f"{type(self).__name__}(steps={steps}): expected 1 or more")
        if skip_batches is not None and skip_batches < 0:
            raise OptionsError(f"{type(self).__name__}(skip_batches={skip_batches}): expected None, 0 or more")
        self.metric = metric
        self.steps = steps
        self.skip_batches = skip_batches

    def why_unfit(self, value: float) -> str:
        """Return why to rewind; empty if there is no reason.

        Args:
            value: the newest value.
        """
        raise NotImplementedError

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reject a strategy or training data that does not allow a rewind.

        Raises:
            OptionsError: the strategy keeps no history, or batches of the training data cannot be skipped.
        """
        engine = getattr(trainer.strategy, "engine", None)
        if engine is None or engine.running is None:
            raise OptionsError(
                f"{type(self).__name__} needs strategy='ckptless', found {type(trainer.strategy).__name__}"
            )
        engine.running.rewinding.require_possible(skips=self.skip_batches != 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the newest value."""
        value = self._value(trainer, outputs)
        why = "" if value is None else self.why_unfit(value)
        if why:
            stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
            newest_good = trainer.global_step - stepped
            trainer.strategy.ask_to_rewind(
                f"{self.metric}={value:g} on rank {trainer.global_rank} {why} (batch {batch_idx} of epoch "
                f"{trainer.current_epoch})",
                to_step=max(0, newest_good + 1 - self.steps),
                steps=None,
                skip_batches=self.skip_batches,
            )

    def _value(self, trainer: Any, outputs: Any) -> float | None:
        found = outputs.get(self.metric) if isinstance(outputs, Mapping) else None
        if found is None and not isinstance(outputs, Mapping) and self.metric == "loss":
            found = outputs
        if found is None:
            found = trainer.callback_metrics.get(self.metric)
        return None if found is None else float(found)


class RewindOnNonFiniteMixin(RewindMixin):
    """Rewinds all ranks when a value is NaN or infinite on any of them.

    Args:
        metric: name of the value: an entry of what `training_step` returns (`loss` for a single tensor), or else a
            value that was logged with `self.log`.
        steps: number of optimizer steps to go back; 1 undoes the one that used the value.
        skip_batches: batches of each rank to skip from there on; None for all up to the current one.

    Raises:
        OptionsError: a value is out of range.
    """

    def __init__(self, metric: str = "loss", *, steps: int = 1, skip_batches: int | None = None) -> None:
        super().__init__(metric, steps, skip_batches)

    def why_unfit(self, value: float) -> str:
        """Return why to rewind; empty if there is no reason."""
        return "" if math.isfinite(value) else "is not finite"


class RewindOnSpikeMixin(RewindMixin):
    """Rewinds all ranks when a value jumps on any of them, compared with its median over the batches before.

    Args:
        metric: name of the value: an entry of what `training_step` returns (`loss` for a single tensor), or else a
            value that was logged with `self.log`.
        factor: a value above this multiple of the median is a spike, and so is one that is not finite.
        window: number of batches whose median counts; nothing is a spike before there are that many.
        steps: number of optimizer steps to go back; 1 undoes the one that used the value.
        skip_batches: batches of each rank to skip from there on; None for all up to the current one.

    Raises:
        OptionsError: a value is out of range.
    """

    def __init__(
        self,
        metric: str = "loss",
        factor: float = 3.0,
        window: int = 50,
        *,
        steps: int = 1,
        skip_batches: int | None = None,
    ) -> None:
        super().__init__(metric, steps, skip_batches)
        if not factor > 1 or window < 1:
            raise OptionsError(f"RewindOnSpike(factor={factor}, window={window}): expected factor > 1 and window >= 1")
        self.factor = factor
        self.window = window
        self.recent: list[float] = []

    def why_unfit(self, value: float) -> str:
        """Return why to rewind; if there is no reason, return an empty text and include the value in the median."""
        if why := why_spike(value, self.recent, self.factor, self.window):
            return why
        self.recent = [*self.recent, value][-self.window :]
        return ""


def why_spike(value: float, recent: Sequence[float], factor: float, window: int) -> str:
    """Return why a value is a spike; empty if it is not.

    Args:
        value: the newest value.
        recent: the values before it, the newest last.
        factor: multiple of their median above which it is a spike.
        window: number of values that are needed.
    """
    if not math.isfinite(value):
        return "is not finite"
    if len(recent) < window:
        return ""
    usual = median(recent[-window:])
    if value - usual <= (factor - 1) * abs(usual):
        return ""
    return f"is more than {factor:g} times the median of the {window} batches before, {usual:g}"
