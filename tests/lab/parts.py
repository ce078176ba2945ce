"""A small training run with one option per axis of the fault matrix."""

from __future__ import annotations

import ast
import importlib
import os
import random
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from tests.lab.kinds import Thaw, block_of, callback_of, two_optimizers


@dataclass(frozen=True)
class Options:
    """One field per axis of the fault matrix.

    Args:
        distribution: distribution of Lightning.
        devices: ranks per node.
        num_nodes: number of nodes.
        epochs: number of epochs.
        samples: number of training samples.
        data: `map`, `dropping`, `sampler`, `own_sampler`, `uneven`, `iterable`, `sized_iterable`, `stateful`,
            `combined`, `combined_stream` or `plain`.
        drop: batches that the sampler of each rank never produces, as `epoch:first:count`; with `dropping` data.
        reload_every: epochs between reloads of the dataloaders; 0 for never.
        workers: dataloader workers.
        persistent: whether dataloader workers are persistent.
        optimization: `adamw`, `sgd`, `manual`, `two`, `two_odd` or `two_quick`.
        scheduler: `step`, `epoch`, `plateau` or `none`.
        accumulate: batches per optimizer step.
        clip: norm for gradient clipping.
        precision: precision of the trainer.
        ema: whether the weights are averaged.
        val_interval: interval between validations, as `val_check_interval`.
        limit_train: limit of training batches, as `limit_train_batches`.
        logger: `csv`, `tensorboard`, `both` or `none`.
        checkpoint_every: steps between checkpoint files; 0 for none.
        early_stopping: whether to use early stopping.
        max_steps: limit of optimizer steps.
        root: folder of the run.
        seed: seed of all generators.
        strategy_options: options of the strategy, a Python dictionary.
        ckpt_path: checkpoint file to start from.
        slow_mirror_s: delay of each mirror round.
        slow_mirror_at: moment of that delay.
        slow_until: file whose appearance ends that delay; empty for never.
        validate_after_commit: whether validation waits for the commit of the version before it.
        accelerator: accelerator of the trainer.
        pin_memory: whether dataloaders pin memory.
        raise_at: step at which rank 0 raises a ValueError, every time.
        terminate_at: step at which the last rank gets SIGTERM.
        mesh: sizes of data and tensor parallelism of a sharded model, such as `2x1`; empty for DDP.
        sharding: `plain`, `hybrid` (replicated over the first dimension, sharded over the second), `partly` (frozen and
            tied weights, and a head that is not sharded), `mixed` (computed in bf16), `offloaded` (parameters on the
            CPU) or `compiled` (each layer, before it is sharded).
        block: middle block of a model that is not sharded: `adapted` (frozen, with low-rank adapters),
            `compiled:BACKEND`, `exchanging` (with the other ranks) or `following:HOW` (a layer with a moving average).
        callback: `averaging` (StochasticWeightAveraging), `finetuning` (a parameter group for the body from epoch 1
            on), `searching` (LearningRateFinder before training and before epoch 1), `dying` (rank 0 dies in the
            start hook of its second process), `dragging` (the first process of rank 1 is slow), `decaying` (weights
            change at the start of a batch), `spiking` (the loss that rank 1 reports once for batch 7 of epoch 0 is a
            hundred times too high, and all ranks are rewound) or `peculiar` (state in unusual places, and a bias that
            differs between ranks).
        thaw_at: step until which the first layers are frozen.
        commits: file that receives a line per commit and rank.
        settings: other arguments of the trainer, a Python dictionary; plugins by class name.
    """

    distribution: str = "lightning.pytorch"
    devices: int = 2
    num_nodes: int = 1
    epochs: int = 2
    samples: int = 48
    data: str = "map"
    drop: str = ""
    reload_every: int = 0
    workers: int = 0
    persistent: bool = False
    optimization: str = "adamw"
    scheduler: str = "step"
    accumulate: int = 1
    clip: float | None = None
    precision: str = "32-true"
    ema: bool = False
    val_interval: float = 1.0
    limit_train: float = 1.0
    logger: str = "csv"
    checkpoint_every: int = 0
    early_stopping: bool = False
    max_steps: int = -1
    root: str = "."
    seed: int = 7
    strategy_options: str = "{}"
    ckpt_path: str = ""
    slow_mirror_s: float = 0.0
    slow_mirror_at: str = "send"
    slow_until: str = ""
    validate_after_commit: bool = False
    accelerator: str = "cpu"
    pin_memory: bool = False
    raise_at: int = 0
    terminate_at: int = 0
    mesh: str = ""
    sharding: str = "plain"
    block: str = ""
    callback: str = ""
    thaw_at: int = 0
    commits: str = ""
    settings: str = "{}"


def link_is_down() -> None:
    """A health check that fails."""
    raise OSError("the link is down")


class Numbers(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that encode their index, with random augmentation from every generator."""

    def __init__(self, samples: int, shift: float = 0.0) -> None:
        self.samples, self.shift = samples, shift

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.1 * torch.rand(6) + 0.01 * random.random() + 0.01 * np.random.rand()
        return torch.full((6,), index / self.samples + self.shift) + noise, torch.tensor(index % 3)


class Dropping(BatchSampler):
    """The batches of one rank in one epoch, without some of them."""

    def __init__(self, numbers: Numbers, trainer: Any, drop: str) -> None:
        sampler: Any = DistributedSampler(numbers, trainer.world_size, trainer.global_rank, shuffle=True, seed=5)
        super().__init__(sampler, 4, drop_last=False)
        epoch, first, count = (int(number) for number in drop.split(":")) if drop else (-1, 0, 0)
        self.dropped = list(range(first, first + count)) if trainer.current_epoch == epoch else []

    def __iter__(self) -> Any:
        return (batch for index, batch in enumerate(super().__iter__()) if index not in self.dropped)

    def __len__(self) -> int:
        return super().__len__() - len(self.dropped)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same samples as a stream; each rank and worker reads its share."""

    def __init__(self, samples: int, rank: int, ranks: int) -> None:
        self.numbers, self.rank, self.ranks = Numbers(samples), rank, ranks

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(self.rank, len(self.numbers), self.ranks)
        return (self.numbers[i] for i in list(mine)[first::stride])


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.numbers) // self.ranks


def shard(model: Any, how: str) -> None:
    """Shard a model over its mesh: layers by tensor parallelism, then everything by fully sharded data parallelism."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    data, tensor = model.device_mesh["data_parallel"], model.device_mesh["tensor_parallel"]
    if how == "partly":
        model.body[0].weight.requires_grad_(False)
        model.block.again = Block(16)
        model.block.again.up.weight = model.block.up.weight
    if how == "compiled":
        for part in (model.body[0], model.block, model.head):
            part.compile(backend="aot_eager")
    if tensor.size() > 1 and how == "plain":
        parallelize_module(model.block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    policies: dict[str, Any] = {
        "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    if data.size() > 1:
        for part in (model.body[0], model.body, model.block, *([] if how == "partly" else [model.head])):
            fully_shard(
                part,
                mesh=model.device_mesh if how == "hybrid" else data,
                **policies.get(how if part is not model.body else "", {}),
            )


class Block(nn.Module):
    """Two layers for tensor parallelism, and a norm that is replicated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.again: nn.Module | None = None
        self.uses = [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.uses[0] += 1
        hidden: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        if self.again is not None:
            hidden = hidden + 0.01 * self.uses[0] * checkpoint(self.again, x, use_reentrant=False)
        return x + hidden


def model_class(distribution: Any, options: Options) -> Any:
    """Return the model class for one distribution of Lightning."""

    class Model(distribution.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
            self.block = Block(16) if options.mesh else block_of(options.block, 16)
            self.head = nn.Linear(16, 3)
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
            self.mean = torchmetrics.MeanMetric()
            self.has_two = options.optimization.startswith("two")
            self.thaw = Thaw(options.thaw_at)
            self.automatic_optimization = options.optimization != "manual" and not self.has_two
            self.seen_batches = 0
            self.outputs: list[torch.Tensor] = []
            self.generator = np.random.default_rng(3)

        def configure_model(self) -> None:
            if options.mesh:
                shard(self, options.sharding)

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch[0] if options.data.startswith("combined") else batch
            logits = self.head(self.block(self.body(x)))
            self.accuracy.update(logits, y)
            return nn.functional.cross_entropy(logits, y)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if options.raise_at and self.global_step + 1 == options.raise_at and self.global_rank == 0:
                raise ValueError(f"the program's own error at step {options.raise_at}")
            if (
                options.terminate_at
                and self.global_step + 1 == options.terminate_at
                and self.global_rank == options.devices - 1
            ):
                os.kill(os.getpid(), signal.SIGTERM)
            loss = self.loss(batch) + 0.001 * float(self.generator.random())
            self.seen_batches += 1
            self.outputs.append(loss.detach())
            self.mean.update(loss.detach())
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            if options.callback == "spiking":
                return {"loss": loss, "watched": loss.item() * (100 if self.spikes(batch_idx) else 1)}
            if self.automatic_optimization:
                return loss
            for optimizer in self.optimizers() if self.has_two else [self.optimizers()]:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            if options.scheduler == "step":
                schedulers = self.lr_schedulers()
                for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                    scheduler.step()
            return None

        def spikes(self, batch_idx: int) -> bool:
            """Return whether this batch spikes, which it does once."""
            # Variables of the script would be rewound.
            has_spiked = "SPIKED" in os.environ
            if has_spiked or options.drop or (self.global_rank, self.current_epoch, batch_idx) != (1, 0, 7):
                return False
            os.environ["SPIKED"] = "1"
            return True

        def on_train_epoch_end(self) -> None:
            self.log("seen", float(self.seen_batches))
            self.log("outputs", sum(self.outputs, torch.zeros(())))
            self.log("mean", self.mean.compute())
            self.mean.reset()
            self.outputs.clear()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.thaw.before_batch(self.body, self.global_step)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", nn.functional.cross_entropy(self.head(self.block(self.body(x))), y), sync_dist=True)

        def configure_optimizers(self) -> Any:
            if self.has_two:
                optimizers = two_optimizers(options.optimization, self.body.parameters(), self.head.parameters())
                return optimizers, [torch.optim.lr_scheduler.StepLR(o, 3, 0.9) for o in optimizers]
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            optimizer: Any = torch.optim.AdamW(trained, 1e-2)
            if options.optimization == "sgd":
                optimizer = torch.optim.SGD(self.parameters(), 1e-2)
            if options.scheduler == "plateau":
                scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}
            if options.scheduler == "none":
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": options.scheduler}}

    return Model


def data_class(distribution: Any, options: Options) -> Any:
    """Return the data module class for one distribution of Lightning."""

    class Data(distribution.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.made = 0

        def shift(self) -> float:
            """Return a value that depends on when the dataloader is created; 0 if it is not made again, or drops."""
            if not options.reload_every or options.data == "dropping":
                return 0.0
            self.made += 1
            trainer = self.trainer
            assert trainer is not None
            return float(0.1 * self.made + trainer.current_epoch + 0.01 * trainer.global_step + torch.rand(()))

        def train_dataloader(self) -> Any:
            trainer = self.trainer
            assert trainer is not None
            common: dict[str, Any] = {
                "batch_size": 4, "num_workers": options.workers, "persistent_workers": options.persistent,
                "pin_memory": options.pin_memory,
            }  # fmt: skip
            numbers = Numbers(options.samples, self.shift())
            if options.data in ("own_sampler", "sampler"):
                is_own = options.data == "own_sampler"
                # Without a number of ranks, it asks the process group.
                world_size, rank = (None, None) if is_own else (trainer.world_size, trainer.global_rank)
                sampler: Any = DistributedSampler(numbers, world_size, rank, shuffle=True, seed=0 if is_own else 5)
                return DataLoader(numbers, sampler=sampler, **common)
            if options.data == "dropping":
                return DataLoader(
                    numbers, batch_sampler=Dropping(numbers, trainer, options.drop), num_workers=options.workers
                )
            if options.data == "uneven":
                mine = options.samples * (2 - trainer.global_rank)
                return DataLoader(Stream(mine, trainer.global_rank, trainer.world_size), **common)
            if options.data in ("iterable", "sized_iterable"):
                kind = Stream if options.data == "iterable" else SizedStream
                return DataLoader(kind(options.samples, trainer.global_rank, trainer.world_size), **common)
            if options.data == "stateful":
                from torchdata.stateful_dataloader import StatefulDataLoader

                return StatefulDataLoader(numbers, shuffle=True, **common)
            if options.data == "combined_stream":
                stream = Stream(10 * trainer.world_size, trainer.global_rank, trainer.world_size)
                return [DataLoader(numbers, shuffle=True, **common), DataLoader(stream, batch_size=2)]
            if options.data == "combined":
                from_short = DataLoader(Numbers(12), batch_size=2, shuffle=True)
                return [DataLoader(numbers, shuffle=True, **common), from_short]
            return DataLoader(numbers, shuffle=True, **common)

        def val_dataloader(self) -> Any:
            return DataLoader(Numbers(16, self.shift()), batch_size=4)

    return Data


def make_trainer(distribution: Any, options: Options, strategy: Any, extra_callbacks: tuple[Any, ...] = ()) -> Any:
    """Return a trainer with the loggers, callbacks and limits of the options."""
    loggers = {
        "csv": lambda: [distribution.loggers.CSVLogger(options.root)],
        "tensorboard": lambda: [distribution.loggers.TensorBoardLogger(options.root)],
        "both": lambda: [
            distribution.loggers.CSVLogger(options.root),
            distribution.loggers.TensorBoardLogger(options.root, name="tb"),
        ],
        "none": lambda: False,
    }[options.logger]()
    callbacks: list[Any] = [*extra_callbacks]
    if options.ema:
        callbacks.append(distribution.callbacks.EMAWeightAveraging(decay=0.9))
    if options.callback:
        callbacks.append(callback_of(options.callback, distribution))
    if options.early_stopping:
        callbacks.append(distribution.callbacks.EarlyStopping("val_loss", patience=50))
    if options.checkpoint_every:
        callbacks.append(
            distribution.callbacks.ModelCheckpoint(every_n_train_steps=options.checkpoint_every, save_top_k=-1)
        )
    val_interval = int(options.val_interval) if options.val_interval > 1 else options.val_interval
    limit = int(options.limit_train) if options.limit_train > 1 else options.limit_train
    arguments: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
        "strategy": strategy,
        "max_epochs": options.epochs,
        "max_steps": options.max_steps,
        "reload_dataloaders_every_n_epochs": options.reload_every,
        "precision": options.precision,
        "accumulate_grad_batches": options.accumulate,
        "gradient_clip_val": options.clip,
        "val_check_interval": val_interval,
        "limit_train_batches": limit,
        "log_every_n_steps": 1,
        "logger": loggers,
        "callbacks": callbacks,
        "default_root_dir": options.root,
        "enable_checkpointing": bool(options.checkpoint_every),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    given = ast.literal_eval(options.settings)
    if "plugins" in given:
        given["plugins"] = [getattr(distribution.plugins, name)() for name in given["plugins"]]
    return distribution.Trainer(**(arguments | given))


def make_run(options: Options, strategy: Any, extra_callbacks: tuple[Any, ...] = ()) -> tuple[Any, Any, Any]:
    """Seed everything, then create trainer, model and data."""
    distribution = importlib.import_module(options.distribution)
    distribution.seed_everything(options.seed, workers=True, verbose=False)
    trainer = make_trainer(distribution, options, strategy, extra_callbacks)
    return trainer, model_class(distribution, options)(), data_class(distribution, options)()
