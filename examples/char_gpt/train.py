"""A small GPT that learns Python's standard library, character by character.

    python examples/char_gpt/train.py
    ckptless run --nproc-per-node 2 examples/char_gpt/train.py --steps 500
    ckptless drill examples/char_gpt/train.py --nproc 2 --fault kill:rank=1:step=40 -- --steps 80
    ckptless drill examples/char_gpt/train.py --nproc 4 --fault kill:rank=3:step=40 -- --steps 80 --mesh 2x2

The text is read from the local installation. The first two commands train the model. The third trains it twice, the
second time with a killed rank, and compares every step. The fourth also shards it: FSDP2 over two ranks, and tensor
parallelism of its large layers over two more.
"""

from __future__ import annotations

import argparse
import math
import os
import string
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import lightning_ckptless

ALPHABET = string.printable
TOKENS = {character: token for token, character in enumerate(ALPHABET)}
Batch = tuple[Tensor, Tensor]


class Windows(Dataset[Batch]):
    """Windows of text, each with the same window shifted by one character as its target."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        begin = index * self.context
        window = self.text[begin : begin + self.context + 1]
        return window[:-1], window[1:]


class StandardLibrary(LightningDataModule):
    """The source of Python's standard library, as text.

    Args:
        files: number of modules, in alphabetical order.
        context: characters per window.
        batch_size: windows per rank and step.
    """

    def __init__(self, files: int = 40, context: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.files = files
        self.context = context
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        modules = sorted(Path(os.__file__).parent.glob("*.py"))[: self.files]
        text = "\n".join(module.read_text(encoding="utf-8") for module in modules)
        tokens = torch.tensor([TOKENS[character] for character in text if character in TOKENS])
        held_out = 16 * self.batch_size * self.context
        self.train, self.val = (Windows(part, self.context) for part in (tokens[:-held_out], tokens[-held_out:]))

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, self.batch_size)


class Block(nn.Module):
    """A pre-norm transformer block with causal attention and a feed-forward network."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        update: Tensor = self.mlp(self.norm_2(x))
        return x + update


class CharGPT(LightningModule):
    """A transformer that predicts the next character.

    Args:
        layers: number of blocks.
        heads: attention heads per block.
        width: features per character.
        context: characters of context.
        dropout: dropout probability.
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warmup to the peak, followed by a cosine decay.
    """

    def __init__(
        self,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int = 64,
        dropout: float = 0.1,
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context = context
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.token_embedding = nn.Embedding(len(ALPHABET), width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, len(ALPHABET), bias=False)

    def configure_model(self) -> None:
        """Shard the model over the strategy's mesh, if it has one."""
        if (mesh := self.device_mesh) is None:
            return
        # Imported here because the imports are slow.
        from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415
        from torch.distributed.tensor.parallel import (  # noqa: PLC0415
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        if isinstance(self.head, FSDPModule):
            return
        if (tensor := mesh["tensor_parallel"]).size() > 1:
            plan = {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()}
            parallelize_module(self, tensor, plan)
        for part in (self.token_embedding, self.position_embedding, *self.blocks, self.head):
            fully_shard(part, mesh=mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.head(self.blocks(x))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        tokens, targets = batch
        return functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: str, characters: int) -> str:
        """Continue a text by sampling with a fixed seed."""
        self.eval()
        generator = torch.Generator().manual_seed(1)
        text = torch.tensor([[TOKENS[character] for character in prompt]], device=self.device)
        for _ in range(characters):
            probabilities = self(text[:, -self.context :])[:, -1].softmax(-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        return "".join(ALPHABET[token] for token in text[0])


class BadBatch(Callback):
    """Gives the last rank a batch with random targets, once.

    Args:
        step: step with this batch.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        is_last_rank = trainer.global_rank == trainer.world_size - 1
        if is_last_rank and trainer.global_step + 1 == self.step and "BAD_BATCH" not in os.environ:
            # In the environment: attributes and variables of the script are rolled back when the run is rewound.
            os.environ["BAD_BATCH"] = "given"
            batch[1].random_(len(ALPHABET))


def strategy(mesh: str, **options: Any) -> Any:
    """Return the strategy for a mesh such as `2x1`, or for an empty string."""
    if not mesh:
        return lightning_ckptless.CkptlessStrategy(**options)
    data, tensor = (int(size) for size in mesh.split("x"))
    return lightning_ckptless.CkptlessModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
    parser.add_argument(
        "--devices", type=int, default=started, help="ranks on this node (default: LOCAL_WORLD_SIZE, or 2)"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="features per character (default: %(default)s)")
    parser.add_argument("--context", type=int, default=64, help="characters of context (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per rank and step (default: %(default)s)")
    parser.add_argument(
        "--mesh",
        default="",
        help="shard the model over DATAxTENSOR ranks, such as 2x1 (default: do not shard)",
    )
    parser.add_argument(
        "--failure-domain", default="node", help="unit that fails as a whole, node or rank (default: %(default)s)"
    )
    parser.add_argument("--bad-batch-at", type=int, default=0, help="step with a bad batch, and rewind (default: none)")
    parser.add_argument("--folder", default=".", help="folder for logs and checkpoint files (default: current folder)")
    args = parser.parse_args()

    seed_everything(1, workers=True)
    model = CharGPT(layers=args.layers, width=args.width, context=args.context)
    callbacks: list[Callback] = [ModelCheckpoint(monitor="val_loss")]
    if args.bad_batch_at:
        callbacks += [BadBatch(args.bad_batch_at), lightning_ckptless.RewindOnSpike("loss", factor=1.3, window=10)]
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy(args.mesh, failure_domain=args.failure_domain, history=8 if args.bad_batch_at else 0),
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 4),
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        # torch cannot compute the norm of gradients if only some of them are tensor parallel.
        gradient_clip_algorithm="norm" if args.mesh in {"", f"{args.devices}x1"} else "value",
        logger=CSVLogger(args.folder),
        callbacks=callbacks,
        default_root_dir=args.folder,
    )
    trainer.fit(model, StandardLibrary(context=args.context, batch_size=args.batch_size))
    # Runs on all ranks, because each holds a part of a sharded model.
    text = model.generate("def ", 200)
    if trainer.is_global_zero:
        print(text)


if __name__ == "__main__":
    main()
