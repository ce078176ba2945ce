"""The structure of optimizers: which parameters lie in which group, by name, as hooks may change it in training.

A backbone that is thawed gets a parameter group of its own. A new process makes the groups that `configure_optimizers`
made, so a version holds the names in each group, and restoring it puts the parameters into the groups they were in:
groups made since vanish, those that a process lacks are made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.trainer.state.tensors import optimizer_parameters

_MOST_SHOWN = 5
Names = list[list[str]]
"""Of the parameters in each group of one optimizer."""


class GroupNames:
    """The names in the groups of a trainer's optimizers, looked up again only where groups have changed."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._kinds = _kinds(trainer)
        self._seen: Any = None
        self._names: list[Names] = []
        self._first: list[set[str]] | None = None

    def now(self) -> list[Names]:
        """The names in each group of each optimizer.

        Raises:
            OptionsError: a hook has changed the optimizers into what a new process could not make.
        """
        seen = [
            (id(optimizer), [(len(params), id(params[0]) if params else 0) for params in _groups(optimizer)])
            for optimizer in self._trainer.optimizers
        ]
        if seen != self._seen:
            self._require_same_kinds()
            self._seen, self._names = seen, names_in_groups(self._trainer)
            self._require_names()
        return self._names

    def _require_same_kinds(self) -> None:
        if (kinds := _kinds(self._trainer)) != self._kinds:
            raise OptionsError(
                f"rank {self._trainer.global_rank}: the optimizers were {', '.join(self._kinds)} when training began "
                f"and are {', '.join(kinds)} at step {self._trainer.global_step}: a new process makes those of "
                "configure_optimizers(), and could not continue with others. Return all of them from the beginning, or "
                "change the groups of one"
            )

    def _require_names(self) -> None:
        unnamed = [{name for names in groups for name in names if name.startswith("#")} for groups in self._names]
        self._first = self._first if self._first is not None else unnamed
        for index, (first, found) in enumerate(zip(self._first, unnamed, strict=True)):
            if new := sorted(found - first):
                raise OptionsError(
                    f"rank {self._trainer.global_rank}: optimizer {index} was given parameters at step "
                    f"{self._trainer.global_step} that the model does not hold ({', '.join(new)}: group and place), "
                    "which a new process could not make. Make them attributes of the LightningModule"
                )


def names_in_groups(trainer: Any) -> list[Names]:
    """The names of the parameters in each group of each optimizer."""
    found = []
    for index, optimizer in enumerate(trainer.optimizers):
        names = {id(parameter): name for name, parameter in optimizer_parameters(trainer, index).items()}
        found.append([[names[id(parameter)] for parameter in params] for params in _groups(optimizer)])
    return found


def require_same_groups(expected: list[Names], found: list[Names]) -> None:
    """Compare the groups that a script made at its start with those that it made when the run began.

    Args:
        expected: when the run began.
        found: in this process.

    Raises:
        LayoutMismatchError: they differ; names the first parameters that do.
    """
    for index in range(max(len(expected), len(found))):
        before, now = (set(_placed(names[index])) if index < len(names) else set() for names in (expected, found))
        if before != now:
            changed = sorted(before ^ now)
            more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
            raise LayoutMismatchError(
                f"the mirrored run began with {len(expected)} optimizers, and the relaunched script made {len(found)}; "
                f"optimizer/{index} has other parameters in its groups: {', '.join(changed[:_MOST_SHOWN])}{more}. "
                "configure_optimizers() must return the same at every start"
            )


def _placed(groups: Names) -> list[str]:
    return [f"{name} (group {number})" for number, names in enumerate(groups) for name in names]


def restore_groups(trainer: Any, saved: list[Names]) -> None:
    """Put parameters into the groups that they were in; what a group has beside them is put back later.

    Args:
        trainer: its optimizers are set up.
        saved: what `names_in_groups` returned.
    """
    found = names_in_groups(trainer)
    if found == saved:
        return
    of_model = dict(trainer.lightning_module.named_parameters())
    for index, (optimizer, groups) in enumerate(zip(trainer.optimizers, saved, strict=False)):
        parameters: dict[str, nn.Parameter] = of_model | optimizer_parameters(trainer, index)
        for number, names in enumerate(groups):
            if number == len(optimizer.param_groups):
                optimizer.param_groups.append({**optimizer.defaults, "params": []})
            optimizer.param_groups[number]["params"][:] = [parameters[name] for name in names if name in parameters]
        del optimizer.param_groups[len(groups) :]
        _forget_others(optimizer)


def _forget_others(optimizer: Any) -> None:
    """Drop the state of parameters that are in no group."""
    kept = {id(parameter) for params in _groups(optimizer) for parameter in params}
    for parameter in [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in kept]:
        del optimizer.state[parameter]


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def _kinds(trainer: Any) -> list[str]:
    return [f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" for optimizer in trainer.optimizers]
