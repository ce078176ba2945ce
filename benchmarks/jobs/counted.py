"""The script that `elastic` starts on every node: a small regression that records the samples of each rank."""

from __future__ import annotations

import argparse
import ast
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH = 3
WIDTH = 64
SLOW = "slow"
"""While this file exists, steps take longer, so that nodes that join find the job running."""
CHECKPOINTS = "checkpoints"


class Indexed(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples with their index."""

    def __init__(self, samples: int) -> None:
        self.inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index], self.inputs[index].sum().sin(), index


class Notebook:
    """The samples of the current step; in a separate class, because a version would contain plain values.

    Args:
        folder: folder that receives a file of each process.
        pace_s: seconds to wait after a step while the file `slow` exists.
    """

    def __init__(self, folder: Path, pace_s: float) -> None:
        self.folder, self.pace_s = folder, pace_s
        self.step: tuple[int, int] | None = None
        self.samples: list[int] = []

    def saw(self, attempt: int, step: int, samples: list[int]) -> None:
        """Add a micro-batch of a step; those of an interrupted step are dropped."""
        if self.step != (attempt, step):
            self.step, self.samples = (attempt, step), []
        self.samples += samples

    def close(self, **facts: Any) -> None:
        """Record the finished step."""
        with (self.folder / f"seen-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps({**facts, "at": time.time(), "samples": self.samples}) + "\n")
        if (self.folder / SLOW).exists():
            threading.Event().wait(self.pace_s)


class Counted(pl.LightningModule):
    """Regression that records its samples.

    Args:
        notebook: receives the samples.
        sharded: whether the layers are sharded over the mesh.
    """

    def __init__(self, notebook: Notebook, *, sharded: bool) -> None:
        super().__init__()
        self.notebook, self.sharded, self.began_at = notebook, sharded, 0
        self.body = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
                                  nn.Linear(WIDTH, 1))  # fmt: skip

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - one variant only

            mesh: Any = self.device_mesh
            for layer in (self.body[0], self.body[3], self.body[5], self.body):
                fully_shard(layer, mesh=mesh["data_parallel"])

    @property
    def attempt(self) -> int:
        """Number of the start or reconfiguration; without our strategy, the time of the start in ns."""
        engine: Any = getattr(self.trainer.strategy, "engine", None)
        return self.began_at if engine is None else int(engine.generation)

    def on_train_start(self) -> None:
        if not hasattr(self.trainer.strategy, "engine"):
            self.began_at = int(self.trainer.strategy.broadcast(time.time_ns()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        inputs, targets, indices = batch
        loss: Tensor = (self.body(inputs).squeeze(1) - targets).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(indices))
        for_nothing = getattr(self.trainer.strategy, "runs_for_nothing", False)
        self.notebook.saw(self.attempt, self.global_step, [] if for_nothing else indices.tolist())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.notebook.close(
            attempt=self.attempt, epoch=self.current_epoch, step=self.global_step - 1, rank=self.global_rank,
            world=self.trainer.world_size,
        )  # fmt: skip

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            row = {"epoch": self.current_epoch, "loss": float(self.trainer.callback_metrics["loss"])}
            with (self.notebook.folder / "epochs.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def on_train_end(self) -> None:
        whole = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in self.named_parameters()}
        if self.global_rank == 0:
            torch.save(whole, self.notebook.folder / "end.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def make_strategy(args: argparse.Namespace) -> Any:
    """Return the strategy to pass to the trainer."""
    if args.checkpoint_every:
        return "ddp"
    from lightning_ckptless import CkptlessModelParallelStrategy, CkptlessStrategy  # noqa: PLC0415

    options = ast.literal_eval(args.strategy_options)
    if args.sharded:
        ranks = args.nodes * args.devices
        return CkptlessModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, **options)
    return CkptlessStrategy(**options)


def main() -> None:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.1)
    parser.add_argument("--strategy-options", default="{}")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, help="use Lightning's ddp, with a checkpoint file every N steps"
    )
    args = parser.parse_args()
    pl.seed_everything(5, workers=True, verbose=False)
    callbacks: list[pl.Callback] = []
    if args.checkpoint_every:
        folder = args.folder / CHECKPOINTS
        callbacks = [ModelCheckpoint(folder, every_n_train_steps=args.checkpoint_every, save_last=True)]
    # Lightning's ddp needs the current number of nodes; our strategy needs the target number.
    nodes = int(os.environ["GROUP_WORLD_SIZE"]) if args.checkpoint_every else args.nodes
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.devices, num_nodes=nodes, strategy=make_strategy(args),
        max_epochs=args.epochs, callbacks=callbacks, logger=False, enable_checkpointing=bool(callbacks),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=args.folder,
    )  # fmt: skip
    model = Counted(Notebook(args.folder, args.pace), sharded=args.sharded)
    data = DataLoader(Indexed(args.samples), batch_size=BATCH, shuffle=True)
    trainer.fit(model, data, ckpt_path="last" if args.checkpoint_every else None)


if __name__ == "__main__":
    main()
