"""segmentation-models-pytorch: a small U-Net with its loss and its statistics, collected in lists over an epoch."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.third_party.weights import record_weights


class Segmenter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = smp.Unet(
            "resnet18", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8), in_channels=3, classes=1
        )
        self.loss = smp.losses.DiceLoss("binary")
        self.outputs: dict[str, list[dict[str, Tensor]]] = {"train": [], "valid": []}

    def step(self, batch: Any, stage: str) -> Tensor:
        images, masks = batch
        logits = self.model(images)
        predicted = (logits.sigmoid() > 0.5).long()
        names = ("tp", "fp", "fn", "tn")
        counts = smp.metrics.get_stats(predicted, masks.long(), mode="binary")
        self.outputs[stage].append(dict(zip(names, counts, strict=True)))
        loss: Tensor = self.loss(logits, masks)
        self.log(f"{stage}_loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def epoch_end(self, stage: str) -> None:
        counts = [torch.cat([output[name] for output in self.outputs[stage]]) for name in ("tp", "fp", "fn", "tn")]
        score = smp.metrics.iou_score(*counts, reduction="micro")
        self.log(f"{stage}_iou", score, sync_dist=True)
        self.outputs[stage].clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def on_train_epoch_end(self) -> None:
        self.epoch_end("train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "valid")

    def on_validation_epoch_end(self) -> None:
        self.epoch_end("valid")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def pictures(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 32, 32, generator=generator)
    return TensorDataset(images, (images.mean(1, keepdim=True) > 0.5).float())


def main() -> None:
    pl.seed_everything(1, workers=True)
    model = Segmenter()
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
        model, DataLoader(pictures(40, 0), batch_size=4, shuffle=True), DataLoader(pictures(16, 1), batch_size=4)
    )
    record_weights(model)


if __name__ == "__main__":
    main()
