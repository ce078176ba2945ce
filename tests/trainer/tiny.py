"""The smallest run of a real trainer: one linear layer, eight samples, no files unless asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

DISTRIBUTIONS = ("lightning.pytorch", "pytorch_lightning")


def tiny_module(distribution: str = DISTRIBUTIONS[0]) -> Any:
    """Make a module of one distribution that logs its loss."""
    base: Any = importlib.import_module(distribution).LightningModule

    class Tiny(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Tiny()


def tiny_loader(samples: int = 8, batch_size: int = 2) -> DataLoader[Any]:
    """Make a loader of ascending rows."""
    return DataLoader(TensorDataset(torch.arange(2.0 * samples).reshape(samples, 2) / samples), batch_size)


def tiny_trainer(root: Path, distribution: str = DISTRIBUTIONS[0], **options: Any) -> Any:
    """Make a trainer on one CPU without output."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": str(root),
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return importlib.import_module(distribution).Trainer(**(settings | options))


def callback(distribution: str = DISTRIBUTIONS[0], **hooks: Any) -> Any:
    """Make a callback from functions, by hook name."""
    base = importlib.import_module(f"{distribution}.callbacks").Callback
    return type("Hooks", (base,), {name: staticmethod(hook) for name, hook in hooks.items()})()
