"""A run that records the samples of each step and rank, the metrics of each epoch and the final weights."""

from __future__ import annotations

import argparse
import ast
import json
import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_ckptless

BATCH = 3
PACE_GROWTH = 1.15
LONGEST_PACE_S = 2.0


class Indexed(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Samples with their index, with noise from the global random generator."""

    def __init__(self, samples: int) -> None:
        self.inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.inputs[index] + 0.01 * torch.randn(8), self.inputs[index].sum().sin(), index


class Counted(pl.LightningModule):
    """Regression that records its samples.

    Args:
        folder: receives one file per process, and `end.json`.
        sharded: whether to shard the layers over the mesh, with FSDP2 and, if the mesh has it, tensor parallelism.
        pace_s: delay of the first step while nodes are missing. Each further step is delayed longer, so that the run
            has not ended when they rejoin, however busy the machine is.
        pace_until: file until whose appearance all steps are delayed; None to delay none else.
    """

    def __init__(self, folder: Path, sharded: bool, pace_s: float, pace_until: Path | None) -> None:
        super().__init__()
        self.folder, self.sharded, self.pace_s, self.pace_until = folder, sharded, pace_s, pace_until
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 1))
        self.count = torchmetrics.SumMetric()
        self.step = 0
        self.paced_steps = 0

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            mesh: Any = self.device_mesh
            if mesh["tensor_parallel"].size() > 1:
                parallelize_module(self.body, mesh["tensor_parallel"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
            for layer in (self.body[0], self.body[3], self.body):
                fully_shard(layer, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets, indices = batch
        strategy: Any = self.trainer.strategy
        loss: torch.Tensor = (self.body(inputs).squeeze(1) - targets).square().mean()
        self.count.update(float(len(indices)))
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not strategy.is_padding_batch:
            self.step = self.global_step
            self._record({"samples": indices.tolist(), "batch": batch_idx})
        return loss

    def on_batch_scale(self, before: int, now: int) -> None:
        with (self.folder / f"scaled-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([before, now]) + "\n")

    def on_train_batch_end(self, *_: Any) -> None:
        is_small = self.trainer.world_size < self.trainer.num_nodes * self.trainer.num_devices
        if self.pace_until is None:
            self.paced_steps = self.paced_steps + 1 if is_small else 0
        if is_small if self.pace_until is None else not self.pace_until.exists():
            threading.Event().wait(min(LONGEST_PACE_S, self.pace_s * PACE_GROWTH**self.paced_steps))
        self._record({"done": self.trainer.world_size})

    def _record(self, facts: dict[str, Any]) -> None:
        strategy: Any = self.trainer.strategy
        where = {
            "epoch": self.current_epoch,
            "step": self.step,
            "rank": self.global_rank,
            "generation": strategy.engine.generation,
        }
        with (self.folder / f"seen-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(where | facts) + "\n")

    def on_train_epoch_end(self) -> None:
        count = float(self.count.compute())
        self.count.reset()
        if self.global_rank == 0:
            loss = float(self.trainer.callback_metrics["loss_epoch"])
            with (self.folder / "epochs.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": self.current_epoch, "loss": loss, "count": count}) + "\n")

        if self.trainer.max_epochs == self.current_epoch + 1:
            linger("epoch_end")

    def on_train_end(self) -> None:
        linger("end")
        weights = {
            n: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for n, p in self.named_parameters()
        }
        if self.global_rank == 0:
            (self.folder / "end.json").write_text(json.dumps(weights))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def linger(where: str) -> None:
    """Wait for the file that COUNTED_LINGERS_AT_<where> names, if it is set; announce it with a file `-awaited`."""
    name = os.environ.get(f"COUNTED_LINGERS_AT_{where.upper()}")
    if name is None:
        return
    Path(f"{name}-awaited").touch()
    while not Path(name).exists():
        threading.Event().wait(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--pace-until", type=Path)
    parser.add_argument("--strategy-options", default="{}")
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--tensor", type=int, default=1, help="size of tensor parallelism")
    args = parser.parse_args()
    pl.seed_everything(5, workers=True, verbose=False)
    options = ast.literal_eval(args.strategy_options)
    strategy: Any = lightning_ckptless.CkptlessStrategy(**options)
    if args.sharded:
        ranks = args.nodes * args.devices
        strategy = lightning_ckptless.CkptlessModelParallelStrategy(
            data_parallel_size=ranks // args.tensor, tensor_parallel_size=args.tensor, **options
        )
    trainer = pl.Trainer(
        accelerator=args.accelerator, devices=args.devices, num_nodes=args.nodes, strategy=strategy,
        max_epochs=args.epochs, accumulate_grad_batches=args.accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=args.folder,
    )  # fmt: skip
    model = Counted(args.folder, args.sharded, args.pace, args.pace_until)
    model.automatic_optimization = not args.manual
    linger("start")
    trainer.fit(model, DataLoader(Indexed(args.samples), batch_size=BATCH, shuffle=True))
    (args.folder / "left").touch()


if __name__ == "__main__":
    main()
