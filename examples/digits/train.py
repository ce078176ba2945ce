"""Handwritten digits: a small convolutional network on two ranks, any of which may be killed.

    python examples/digits/train.py
    ckptless run --nproc-per-node 2 examples/digits/train.py
    ckptless drill examples/digits/train.py --nproc 2 --fault kill:rank=1:step=20

The first two commands train the model. The third trains it twice, the second time with a killed rank, and compares
every step.
"""

from __future__ import annotations

import argparse
import os

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy

Batch = tuple[Tensor, Tensor]


class Digits(LightningDataModule):
    """The 1797 digits that come with scikit-learn, 8 x 8 pixels each.

    Args:
        batch_size: images per rank and step.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        split = torch.Generator().manual_seed(1)
        self.train, self.val = random_split(TensorDataset(images, labels), [0.8, 0.2], split)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, self.batch_size)


class DigitClassifier(LightningModule):
    """Two convolutions with batch normalization, dropout, one linear layer.

    Args:
        width: channels of the first convolution.
        dropout: dropout probability.
        learning_rate: initial learning rate of AdamW; divided by ten when the validation loss stops decreasing.
    """

    def __init__(self, width: int = 16, dropout: float = 0.2, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, 10),
        )  # fmt: skip
        self.train_accuracy = Accuracy(task="multiclass", num_classes=10)
        self.val_accuracy = Accuracy(task="multiclass", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
    parser.add_argument(
        "--devices", type=int, default=started, help="ranks on this node (default: LOCAL_WORLD_SIZE, or 2)"
    )
    parser.add_argument("--num-nodes", type=int, default=1, help="number of nodes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data (default: %(default)s)")
    parser.add_argument("--folder", default=".", help="folder for logs and checkpoint files (default: current folder)")
    args = parser.parse_args()

    seed_everything(1, workers=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy="ckptless",
        max_epochs=args.epochs,
        log_every_n_steps=5,
        logger=CSVLogger(args.folder),
        default_root_dir=args.folder,
    )
    trainer.fit(DigitClassifier(), Digits())


if __name__ == "__main__":
    main()
