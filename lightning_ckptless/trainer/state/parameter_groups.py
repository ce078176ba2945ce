"""The structure of optimizers: which parameter is in which group, by name, as hooks may change it in training.

An unfrozen backbone, for example, gets its own parameter group. A new process starts with the groups that
`configure_optimizers` creates. So a version contains the parameter names of each group. Restoring it moves parameters
into their groups, removes groups created since, and creates missing ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.trainer.state.tensors import optimizer_parameters

_MOST_SHOWN = 5
Names = list[list[str]]
"""Parameter names of each group of one optimizer."""


class GroupNames:
    """Caches the parameter names in the groups of a trainer's optimizers until the groups change.

    Attributes:
        changes: how often the names were looked up.
    """

    def __init__(self, trainer: Any) -> None:
        self.changes = 0
        self._trainer = trainer
        self._kinds = _kinds(trainer)
        self._seen: Any = None
        self._names: list[Names] = []
        self._first: list[set[str]] | None = None

    def now(self) -> list[Names]:
        """Return the current names in each group of each optimizer.

        Raises:
            OptionsError: a hook changed the optimizers so that a new process could not recreate them.
        """
        seen = [
            (id(optimizer), [(len(params), id(params[0]) if params else 0) for params in _groups(optimizer)])
            for optimizer in self._trainer.optimizers
        ]
        if seen != self._seen:
            self._require_same_kinds()
            self._seen, self._names = seen, names_in_groups(self._trainer)
            self._require_names()
            self.changes += 1
        return self._names

    def _require_same_kinds(self) -> None:
        if (kinds := _kinds(self._trainer)) != self._kinds:
            raise OptionsError(
                f"rank {self._trainer.global_rank}: the optimizers were {', '.join(self._kinds)} when training began "
                f"and are {', '.join(kinds)} at step {self._trainer.global_step}: a new process creates those of "
                "configure_optimizers() and cannot continue with different ones. Return all of them from the start, or "
                "change the groups of an existing optimizer"
            )

    def _require_names(self) -> None:
        unnamed = [{name for names in groups for name in names if name.startswith("#")} for groups in self._names]
        self._first = self._first if self._first is not None else unnamed
        for index, (first, found) in enumerate(zip(self._first, unnamed, strict=True)):
            if new := sorted(found - first):
                raise OptionsError(
                    f"rank {self._trainer.global_rank}: optimizer {index} was given parameters at step "
                    f"{self._trainer.global_step} that are not in the model ({', '.join(new)}: group and index), so a "
                    "new process could not create them. Make them attributes of the LightningModule"
                )


def names_in_groups(trainer: Any) -> list[Names]:
    """Return the parameter names in each group of each optimizer."""
    found = []
    for index, optimizer in enumerate(trainer.optimizers):
        names = {id(parameter): name for name, parameter in optimizer_parameters(trainer, index).items()}
        found.append([[names[id(parameter)] for parameter in params] for params in _groups(optimizer)])
    return found


def require_same_groups(expected: list[Names], found: list[Names]) -> None:
    """Require that a script starts with the same parameter groups as when the run began.

    Args:
        expected: the groups when the run began.
        found: the groups in this process.

    Raises:
        LayoutMismatchError: they differ; names the first differing parameters.
    """
    for index in range(max(len(expected), len(found))):
        before, now = (set(_placed(names[index])) if index < len(names) else set() for names in (expected, found))
        if before != now:
            changed = sorted(before ^ now)
            more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
            raise LayoutMismatchError(
                f"the mirrored run began with {len(expected)} optimizers, the relaunched script created {len(found)}; "
                f"optimizer/{index} has different parameters in its groups: {', '.join(changed[:_MOST_SHOWN])}{more}. "
                "configure_optimizers() must return the same at every start"
            )


def _placed(groups: Names) -> list[str]:
    return [f"{name} (group {number})" for number, names in enumerate(groups) for name in names]


def restore_groups(trainer: Any, saved: list[Names]) -> None:
    """Move parameters into their saved groups. The other values of a group are restored later.

    Args:
        trainer: its optimizers are set up.
        saved: the result of `names_in_groups`.
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
        _drop_other_state(optimizer)


def _drop_other_state(optimizer: Any) -> None:
    """Delete the optimizer state of parameters that are in no group."""
    kept = {id(parameter) for params in _groups(optimizer) for parameter in params}
    for parameter in [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in kept]:
        del optimizer.state[parameter]


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def _kinds(trainer: Any) -> list[str]:
    return [f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" for optimizer in trainer.optimizers]
