"""Parameter groups and schedulers that hooks create in training, restored in a survivor and in a new process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.parameter_groups import (
    GroupNames,
    names_in_groups,
    require_same_groups,
    restore_groups,
)
from lightning_ckptless.trainer.state.schedulers import Schedulers


def trainer_with(*, momentum: float = 0.9) -> Any:
    """Make a trainer as after `configure_optimizers`: only the head is trained."""
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model["head"].parameters(), 0.1, momentum=momentum)
    return SimpleNamespace(
        lightning_module=model, optimizers=[optimizer], lr_scheduler_configs=[], global_rank=0, global_step=3
    )


def unfreeze(trainer: Any) -> None:
    trainer.optimizers[0].add_param_group({"params": list(trainer.lightning_module["body"].parameters()), "lr": 0.01})


def step(trainer: Any) -> None:
    model = trainer.lightning_module
    model["head"](model["body"](torch.ones(1, 2))).sum().backward()
    trainer.optimizers[0].step()


UNFROZEN = [[["head.weight", "head.bias"], ["body.weight", "body.bias"]]]


def test_a_new_process_creates_the_group() -> None:
    first, second = trainer_with(), trainer_with()
    names = GroupNames(first)
    assert names.now() == [UNFROZEN[0][:1]]
    unfreeze(first)
    assert names.now() == UNFROZEN
    restore_groups(second, names.now())
    assert names_in_groups(second) == UNFROZEN
    added = second.optimizers[0].param_groups[1]
    assert added["momentum"] == 0.9
    assert all(a is b for a, b in zip(added["params"], second.lightning_module["body"].parameters(), strict=True))


def test_a_group_from_a_rolled_back_step_is_removed() -> None:
    trainer = trainer_with()
    saved = names_in_groups(trainer)
    unfreeze(trainer)
    step(trainer)
    restore_groups(trainer, saved)
    assert names_in_groups(trainer) == saved
    # A state dict numbers parameters by their groups and must not contain others.
    assert len(trainer.optimizers[0].state_dict()["state"]) == 2


def test_adding_a_parameter_outside_the_model_is_rejected() -> None:
    trainer = trainer_with()
    names = GroupNames(trainer)
    names.now()
    trainer.optimizers[0].add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    with pytest.raises(OptionsError, match=r"at step 3 that are not in the model \(#1.0.*attributes of the Light"):
        names.now()


def test_replacing_an_optimizer_by_another_class_is_rejected() -> None:
    trainer = trainer_with()
    names = GroupNames(trainer)
    names.now()
    trainer.optimizers = [torch.optim.AdamW(trainer.lightning_module.parameters())]
    with pytest.raises(OptionsError, match=r"were torch.optim.sgd.SGD .* are torch.optim.adamw.AdamW at step 3"):
        names.now()


# ---------------------------------------------------------------------- schedulers


def schedule(trainer: Any, kind: Any, *args: Any) -> None:
    trainer.lr_scheduler_configs[:] = [LRSchedulerConfig(kind(trainer.optimizers[0], *args))]


def rate_after(trainer: Any, steps: int) -> float:
    for _ in range(steps):
        trainer.optimizers[0].step()
        trainer.lr_scheduler_configs[0].scheduler.step()
    return float(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_later_scheduler_is_created_on_the_optimizer_of_a_new_process() -> None:
    first, second = trainer_with(), trainer_with()
    for trainer in (first, second):
        schedule(trainer, torch.optim.lr_scheduler.StepLR, 1)
    ours, theirs = Schedulers(first), Schedulers(second)
    schedule(first, torch.optim.swa_utils.SWALR, 0.5)
    rate_after(first, 2)
    saved = unpack(pack(ours.capture()))
    theirs.apply(saved)
    second.optimizers[0].param_groups[0].update(
        {k: v for k, v in first.optimizers[0].param_groups[0].items() if k != "params"}
    )
    made = second.lr_scheduler_configs[0].scheduler
    assert type(made) is torch.optim.swa_utils.SWALR
    assert made.optimizer is second.optimizers[0]
    assert rate_after(second, 3) == rate_after(first, 3)


def test_a_scheduler_from_a_rolled_back_step_is_replaced_by_the_previous_one() -> None:
    trainer = trainer_with()
    schedule(trainer, torch.optim.lr_scheduler.StepLR, 1)
    schedulers, first = Schedulers(trainer), trainer.lr_scheduler_configs[0]
    saved = unpack(pack(schedulers.capture()))
    schedule(trainer, torch.optim.swa_utils.SWALR, 0.5)
    schedulers.apply(saved)
    assert trainer.lr_scheduler_configs == [first]


def test_a_scheduler_that_cannot_be_recreated_is_rejected() -> None:
    trainer = trainer_with()
    schedulers = Schedulers(trainer)
    schedule(trainer, torch.optim.lr_scheduler.LambdaLR, lambda _: 1.0)
    with pytest.raises(OptionsError, match=r"the scheduler LambdaLR, added at step 3, .*module level"):
        schedulers.capture()


def test_a_script_that_starts_with_different_groups_is_rejected_by_name() -> None:
    first, second = trainer_with(), trainer_with()
    began_with = names_in_groups(first)
    unfreeze(first)
    require_same_groups(began_with, names_in_groups(second))
    unfreeze(second)
    with pytest.raises(LayoutMismatchError, match=r"optimizer/0 has different .* body\.bias \(group 1\), body\.weight"):
        require_same_groups(began_with, names_in_groups(second))
    second.optimizers.append(torch.optim.SGD(second.lightning_module["body"].parameters(), 0.1))
    with pytest.raises(LayoutMismatchError, match="began with 1 optimizers, the relaunched script created 2"):
        require_same_groups(began_with, names_in_groups(second))
