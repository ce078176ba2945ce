"""timm: a tiny network with stochastic depth, its mixup, optimizer, scheduler and moving average of the weights."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.third_party.weights import record_weights


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet10t", pretrained=False, num_classes=4, drop_path_rate=0.1, drop_rate=0.1)
        self.average = ModelEmaV3(self.model, decay=0.9).requires_grad_(False)
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)
        self.loss = SoftTargetCrossEntropy()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self.mixup(*batch)
        loss: Tensor = self.loss(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.average.update(self.model)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.average(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer_v2(self.model, "lamb", lr=1e-2, weight_decay=0.01)
        scheduler = CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=1e-3)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


def images(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.rand(size, 3, 32, 32, generator=generator), torch.randint(4, (size,), generator=generator)
    )


def main() -> None:
    pl.seed_everything(1, workers=True)
    model = Classifier()
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
    )
    trainer.fit(
        model,
        DataLoader(images(80, 0), batch_size=8, shuffle=True, drop_last=True),
        DataLoader(images(16, 1), batch_size=8),
    )
    record_weights(model)


if __name__ == "__main__":
    main()
