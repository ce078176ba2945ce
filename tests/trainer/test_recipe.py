"""A version assembled by its recipe equals the checkpoint that Lightning writes at the same time."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_ckptless.durable.capture import Captured, ShardCopy
from lightning_ckptless.durable.checkpoint import lightning_checkpoint
from lightning_ckptless.durable.host_state_pickle import PICKLE_MODULE
from lightning_ckptless.durable.recipe import seal_recipe
from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.packing import pack
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.layout.layout import live_views, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.trainer.state.checkpoint_recipe import recipe_of
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.layout_tensors import describe_state
from lightning_ckptless.trainer.state.tensors import StateIndex
from tests.trainer.tiny import DISTRIBUTIONS, tiny_loader, tiny_trainer


class Counted(nn.Module):
    """A module with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def rich_module(distribution: str) -> Any:
    """Make a module with every kind of content that a checkpoint can have."""
    base: Any = importlib.import_module(distribution).LightningModule

    class Rich(base):  # type: ignore[misc]
        def __init__(self, width: int = 4, layer: Any = None, secret: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.first, self.second = nn.Linear(2, width), nn.Linear(width, 2)
            self.tied = nn.Linear(2, width)
            self.tied.weight = self.first.weight
            self.norm, self.counted = nn.BatchNorm1d(2), Counted()
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            self.register_buffer("nothing", torch.empty(0))
            self.mean = torchmetrics.MeanMetric()
            self.mean.persistent(True)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.counted(self.norm(self.second(self.first(batch[0]) + self.tied(batch[0])))).square().mean()
            self.mean.update(loss.detach())
            self.manual_backward(loss)
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"answer": 42}

        def configure_optimizers(self) -> Any:
            groups: list[dict[str, Any]] = [
                {"params": self.first.parameters(), "lr": 0.1},
                {"params": self.second.parameters()},
            ]
            optimizers = [torch.optim.AdamW(groups), torch.optim.SGD(self.norm.parameters(), 0.1, momentum=0.9)]
            return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]

    return Rich(layer=nn.Linear(2000, 2000), secret=lambda: None)


def data_of(distribution: str) -> Any:
    base: Any = importlib.import_module(distribution).LightningDataModule

    class Data(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.seen = 3

        def train_dataloader(self) -> Any:
            return tiny_loader()

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

    return Data()


def capture_from(trainer: Any, options: CkptlessOptions) -> Captured:
    """Capture the state of a single-rank trainer as an arena holds it."""
    index, host_state = StateIndex(trainer), HostState(trainer, options)
    layout = plan_layout([describe_state(index)])
    bulk = torch.zeros(layout.bulk_bytes(0), dtype=torch.uint8)
    for view, source in zip(slot_views(layout, 0, bulk), live_views(layout, 0, 0, index.read()), strict=True):
        view.copy_(source)
    recipe = seal_recipe(pack(recipe_of(trainer, index.read(), host_state.callbacks)))
    snapshot = Snapshot(Version(trainer.global_step, True), 1, 1, layout.digest)
    return Captured(snapshot, layout, (ShardCopy(bulk, pack({"state": host_state.capture(dict)}), ""),), recipe)


def same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where}/{index}")
    else:
        assert found == expected, where


def both(
    distribution: str, root: Path, module: Any, *, ema: bool = False, hooks: Any = "never"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the checkpoint assembled from a version at the end of `fit`, and the one that Lightning saves."""
    made: list[dict[str, Any]] = []
    callbacks: Any = importlib.import_module(f"{distribution}.callbacks")

    class Look(callbacks.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            made.append(lightning_checkpoint(capture_from(trainer, CkptlessOptions(checkpoint_hooks=hooks))))
            trainer.save_checkpoint(root / "own.ckpt")

    if ema and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has it since 2.6")
    extra = [callbacks.EMAWeightAveraging(decay=0.9)] if ema else []
    trainer = tiny_trainer(root, distribution, callbacks=[*extra, Look()])
    trainer.fit(module, datamodule=data_of(distribution))
    # Placeholders for the script's classes become the real classes when the file is read.
    torch.save(made[0], root / "made.ckpt", pickle_module=PICKLE_MODULE)
    found, expected = (torch.load(root / name, weights_only=False) for name in ("made.ckpt", "own.ckpt"))
    return found, expected


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("ema", [False, True])
def test_a_version_contains_everything_in_a_checkpoint(
    ema: bool, distribution: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, expected = both(distribution, tmp_path, rich_module(distribution), ema=ema)
    for name in ("layer", "secret"):
        expected["hyper_parameters"].pop(name, None)
    assert expected.pop("mine") == {"answer": 42}, "only the user's hook adds it"
    assert found["hyper_parameters"] == {"width": 4}
    if ema:
        # The averaged copy has its own extra state and metrics, which never change and are not part of a version.
        own = {key for key in expected["state_dict"] if key.startswith("mean.") or key.endswith("_extra_state")}
        expected["state_dict"] |= {key: expected["current_model_state"][key] for key in own}
    same(found, expected, "")
    assert {"hyper_parameters", "data_of.<locals>.Data", "callbacks"} <= found.keys()
    assert "scratch" not in found["state_dict"] and "tied.weight" in found["state_dict"]


@pytest.mark.parametrize("ema", [False, True])
def test_with_the_users_hooks_the_checkpoint_equals_lightnings(ema: bool, tmp_path: Path) -> None:
    found, expected = both(DISTRIBUTIONS[0], tmp_path, rich_module(DISTRIBUTIONS[0]), ema=ema, hooks="every_version")
    assert found["mine"] == {"answer": 42}
    layers = [checkpoint["hyper_parameters"].pop("layer") for checkpoint in (found, expected)]
    assert torch.equal(layers[0].weight, layers[1].weight)
    same(found, expected, "")


def test_a_state_dict_entry_without_a_tensor_in_the_state_is_rejected(tmp_path: Path) -> None:
    module = rich_module(DISTRIBUTIONS[0])
    module.register_state_dict_post_hook(lambda _, state, *__: state.update({"made.up": torch.ones(2)}))
    with pytest.raises(DurableError, match=r"state_dict has made\.up, which is not a tensor of the state"):
        both(DISTRIBUTIONS[0], tmp_path, module)
