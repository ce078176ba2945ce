"""A job whose steps take a given time, whatever else the machine does: most of a step is a pause.

Several ranks can then share a core, and what a fault costs is not hidden behind a step that varies.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckptless import CkptlessStrategy

WIDTH, LAYERS, BATCH = 256, 4, 4


class Paced(pl.LightningModule):
    """A small model with a pause in each step."""

    def __init__(self, pace_s: float) -> None:
        super().__init__()
        self.pace_s = pace_s
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        time.sleep(self.pace_s)
        loss: Tensor = self.model(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def main() -> None:
    """Train for a number of steps."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pace", type=float, required=True)
    parser.add_argument("--every", type=int, required=True)
    args = parser.parse_args()
    pl.seed_everything(11, verbose=False)
    limits: dict[str, Any] = {"max_recoveries_without_progress": 10**6, "max_recoveries_per_hour": 10**6}
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.ranks, max_steps=args.steps, max_epochs=-1, logger=False,
        strategy=CkptlessStrategy(mirror_every_n_steps=args.every, **limits), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(args.ranks * BATCH * 1000, WIDTH))
    trainer.fit(Paced(args.pace), DataLoader(data, batch_size=BATCH, shuffle=True))


if __name__ == "__main__":
    main()
