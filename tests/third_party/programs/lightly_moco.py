"""lightly: contrastive learning whose loss gathers the other ranks' features, with random augmentations per image."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from tests.third_party.weights import record_weights

EPOCHS = 3


class Images(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = [to_pil_image(torch.rand(3, 32, 32, generator=generator)) for _ in range(80)]
        self._transform = MoCoV2Transform(input_size=24)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._transform(self._images[index])


def backbone() -> nn.Sequential:
    convolution = nn.Conv2d(3, 8, 3, stride=2)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class MoCo(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.momentum_backbone = backbone(), backbone()
        self.head, self.momentum_head = MoCoProjectionHead(8, 16, 8), MoCoProjectionHead(8, 16, 8)
        for source, target in ((self.backbone, self.momentum_backbone), (self.head, self.momentum_head)):
            target.load_state_dict(source.state_dict())
            deactivate_requires_grad(target)
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 8), gather_distributed=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, EPOCHS, 0.99, 1.0)
        update_momentum(self.backbone, self.momentum_backbone, momentum)
        update_momentum(self.head, self.momentum_head, momentum)
        query, key = batch[0], batch[1]
        with torch.no_grad():
            keys = self.momentum_head(self.momentum_backbone(key))
        loss: Tensor = self.criterion(self.head(self.backbone(query)), keys)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler: Mapping[str, Any] = {
            "scheduler": CosineWarmupScheduler(optimizer, warmup_epochs=3, max_epochs=EPOCHS * 5),
            "interval": "step",
        }
        return [optimizer], [scheduler]


def main() -> None:
    pl.seed_everything(1, workers=True)
    model = MoCo()
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=EPOCHS,
        sync_batchnorm=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
    )
    trainer.fit(model, DataLoader(Images(), batch_size=8, shuffle=True, drop_last=True, num_workers=2))
    record_weights(model)


if __name__ == "__main__":
    main()
