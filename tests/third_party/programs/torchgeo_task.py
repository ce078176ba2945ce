"""torchgeo: its classification task and data module unchanged, with batch augmentation by kornia."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoDataset
from torchgeo.trainers import ClassificationTask

from tests.third_party.weights import record_weights


class Scenes(NonGeoDataset):
    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._images = 3000 * torch.rand(size, 4, 32, 32, generator=generator)
        self._labels = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


class ScenesDataModule(NonGeoDataModule):
    def __init__(self) -> None:
        super().__init__(Scenes, batch_size=8, num_workers=0)

    def setup(self, stage: str) -> None:
        self.train_dataset, self.val_dataset = Scenes(80, 0), Scenes(24, 1)

    def plot(self, *args: Any, **kwargs: Any) -> None:
        return None


def main() -> None:
    pl.seed_everything(1, workers=True)
    task = ClassificationTask(model="resnet10t", weights=None, in_channels=4, num_classes=3, lr=1e-3, patience=1)
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
        callbacks=[ModelCheckpoint(monitor="val_loss", save_last=True)],
    )
    trainer.fit(task, datamodule=ScenesDataModule())
    record_weights(task)


if __name__ == "__main__":
    main()
