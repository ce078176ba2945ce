"""A model and data as notebook cells define them: no other process could import them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckptless.ledger import read_ledger
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer

STEPS_PER_EPOCH = 6


def cells(distribution: str = DISTRIBUTIONS[0]) -> tuple[Any, DataLoader[Any]]:
    """Return a model that draws random numbers, and shuffled data."""
    torch.manual_seed(11)
    base: Any = importlib.import_module(distribution).LightningModule

    class Cell(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layers(batch[0] + 0.01 * torch.randn_like(batch[0])).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layers(batch[0]).square().mean(), sync_dist=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.layers(batch[0]).square().mean(), sync_dist=True)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layers(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    data = TensorDataset(torch.randn(8 * STEPS_PER_EPOCH, 4))
    return Cell(), DataLoader(data, batch_size=4, shuffle=True)


def trainer_in(root: Path, strategy: Any, distribution: str = DISTRIBUTIONS[0], **options: Any) -> Any:
    """Return a trainer with two ranks."""
    return tiny_trainer(root, distribution, **{"devices": 2, "strategy": strategy, "max_epochs": 2} | options)


def weights(model: Any) -> list[torch.Tensor]:
    """Return copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def events(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the fields of all ledger events with a name, for all runs below a trainer's root folder."""
    return [
        dict(event.fields)
        for path in sorted((root / "ckptless").glob("*/ledger.jsonl"))
        for event in read_ledger(path, only=name)
    ]
