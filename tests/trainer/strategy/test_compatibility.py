"""What cannot be restored exactly is refused or warned of before training starts, with the remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.trainer.strategy.compatibility import check_trainer, warn_of_loaders
from tests.lab.parts import Numbers, Stream
from tests.trainer.tiny import DISTRIBUTIONS, tiny_module, tiny_trainer


def trainer_with(
    root: Path, distribution: str = DISTRIBUTIONS[0], callbacks: tuple[Any, ...] = (), **options: Any
) -> Any:
    strategy = module(distribution, "strategies").DDPStrategy(**options)
    return tiny_trainer(root, distribution, strategy=strategy, callbacks=[*callbacks])


# ---------------------------------------------------------------------- trainers


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_common_trainer_is_accepted(distribution: str, tmp_path: Path) -> None:
    callbacks = module(distribution, "callbacks")
    usual = (
        # Available since Lightning 2.6.
        *([callbacks.EMAWeightAveraging()] if hasattr(callbacks, "EMAWeightAveraging") else []),
        callbacks.EarlyStopping("loss"),
        callbacks.LearningRateMonitor(),
        callbacks.StochasticWeightAveraging(1e-2),
        callbacks.BackboneFinetuning(),
    )
    trainer = trainer_with(tmp_path, distribution, usual)
    trainer.optimizers = [torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())]
    check_trainer(trainer, CkptlessOptions())


def test_an_optimizer_that_shards_its_state_is_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trainer = trainer_with(tmp_path)
    # Not initialized, which would require a process group.
    sharded = object.__new__(ZeroRedundancyOptimizer)
    trainer.optimizers = [torch.optim.SGD(torch.nn.Linear(1, 1).parameters()), sharded]
    with pytest.raises(
        OptionsError, match=r"optimizer 1 is a ZeroRedundancyOptimizer.*use the optimizer that it wraps"
    ):
        check_trainer(trainer, CkptlessOptions())


def trainer_to_check(**settings: Any) -> Any:
    """A trainer of two ranks whose training step could be run again, except for some settings."""
    model = tiny_module()
    facts = {"world_size": 2, "replicates": True, "hooked": False, "automatic": True, "takes": "batch"} | settings
    model.automatic_optimization = facts["automatic"]
    if facts["hooked"]:
        model.layer.weight.register_hook(lambda gradient: gradient)
    if facts["takes"] == "iterator":
        model.training_step = lambda dataloader_iter: None
    strategy = SimpleNamespace(replicates=facts["replicates"], model=model)
    return SimpleNamespace(
        world_size=facts["world_size"],
        is_global_zero=True,
        strategy=strategy,
        lightning_module=model,
        optimizers=[],
        callbacks=[],
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"world_size": 1}, "start two ranks or more"),
        ({"replicates": False}, "use CkptlessStrategy"),
        ({"automatic": False}, r"automatic_optimization=False\): let Lightning do it"),
        ({"takes": "iterator"}, "let it take a batch"),
        ({"hooked": True}, "layer.weight has a gradient hook, .*move it to on_after_backward"),
    ],
    ids=str,
)
def test_training_steps_that_cannot_run_again_are_refused(settings: dict[str, Any], reason: str) -> None:
    options = CkptlessOptions(replay_check_every=4, on_divergence="raise")
    check_trainer(trainer_to_check(), options)
    with pytest.raises(OptionsError, match=rf"replay_check_every=4: .*{reason}, or leave out the option"):
        check_trainer(trainer_to_check(**settings), options)
    check_trainer(trainer_to_check(**settings), CkptlessOptions())


def test_devices_that_round_differently_each_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, options = trainer_to_check(), CkptlessOptions(replay_check_every=4, on_divergence="raise")
    monkeypatch.setattr(type(trainer.lightning_module), "device", torch.device("cuda"), raising=False)
    with pytest.raises(OptionsError, match=r"set Trainer\(deterministic=True\), or leave out the option"):
        check_trainer(trainer, options)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_trainer(trainer, options)


class SlowWeights(torch.optim.SGD):
    """Keeps averages of its parameters outside its `state`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.slow = {"weights": [[p.detach().clone() for p in group["params"]] for group in self.param_groups]}
        self.overflow = torch.zeros(1)


def test_an_optimizer_that_hides_its_state_is_refused(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    lbfgs = torch.optim.LBFGS(torch.nn.Linear(2, 1).parameters())
    trainer.optimizers = [lbfgs, SlowWeights(torch.nn.Linear(2, 1).parameters())]
    with pytest.raises(OptionsError, match=r"optimizer 1 \(SlowWeights\) keeps tensors in slow, outside"):
        check_trainer(trainer, CkptlessOptions())


def test_model_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"model_averaging_period.*remove this option"):
        check_trainer(trainer_with(tmp_path, model_averaging_period=4), CkptlessOptions())


# ---------------------------------------------------------------------- loaders


class OwnIteration(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


def stateful(**options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Numbers(4), **options)


SILENT: dict[str, Any] = {
    "in order": lambda: DataLoader(Numbers(4)),
    "with workers": lambda: DataLoader(Numbers(4), num_workers=2, persistent_workers=True),
    "stateful": stateful,
}


@pytest.mark.parametrize("kind", SILENT)
def test_loaders_that_are_restored_exactly_cause_no_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_loaders([SILENT[kind]()])
    assert caplog.messages == []


WARNED: dict[str, tuple[Any, list[str]]] = {
    "no loader": (lambda: [1, 2], ["(list): is no DataLoader", "must yield the same"]),
    "own iteration": (
        lambda: OwnIteration(Numbers(4)),
        ["(OwnIteration): has its own iteration", "must yield the same"],
    ),
    "stream": (lambda: DataLoader(Stream(4, 0, 1)), ["read again from the start of the epoch"]),
    "stream, persistent": (
        lambda: DataLoader(Stream(4, 0, 1), num_workers=1, persistent_workers=True),
        ["read again from the start of the epoch", "remove persistent_workers"],
    ),
    "stateful, workers": (lambda: stateful(num_workers=1), ["draw them in the training process"]),
    "any order": (lambda: DataLoader(Numbers(4), num_workers=1, in_order=False), ["in_order=False"]),
}


@pytest.mark.parametrize("kind", WARNED)
def test_loaders_that_lose_something_cause_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = WARNED[kind]
    silent = next(iter(SILENT.values()))
    warn_of_loaders([*(silent() for _ in range(3)), make()])
    said = "\n".join(caplog.messages)
    assert all(word in said for word in words), said
    assert all(message.startswith("ckptless: training dataloader 3 (") for message in caplog.messages)


# ---------------------------------------------------------------------- third-party optimizers


class Wrapper(torch.optim.SGD):
    """Keeps a given value in an attribute."""

    kept: Any


def wrapper(kept: Any) -> Wrapper:
    optimizer = Wrapper(torch.nn.Linear(1, 1).parameters(), 0.1)
    optimizer.kept = kept
    return optimizer


def test_an_optimizer_that_wraps_another_one_is_refused(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    inner = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    trainer.optimizers = [wrapper([inner])]
    with pytest.raises(
        OptionsError, match=r"optimizer 0 \(Wrapper\) wraps another one in kept.*self.state = inner.state"
    ):
        check_trainer(trainer, CkptlessOptions())
    trainer.optimizers[0].state = inner.state
    check_trainer(trainer, CkptlessOptions())


def test_only_attributes_whose_changes_cannot_be_detected_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_with(tmp_path)
    optimizer = wrapper(None)
    for seen in (3, {"a": [1.0]}, len, list(optimizer.param_groups[0]["params"]), torch.optim.AdamW):
        optimizer.kept = seen
        trainer.optimizers = [optimizer]
        check_trainer(trainer, CkptlessOptions())
    assert "ckptless" not in caplog.text
    optimizer.kept = [object()]
    check_trainer(trainer, CkptlessOptions())
    assert "optimizer 0 (Wrapper) keeps objects in kept, whose contents are not restored" in caplog.text
