"""The module of a job, and callbacks that report its steps, one by one or in segments."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.harness.wire import Wire
from benchmarks.jobs.cpu_account import BACKWARD, BETWEEN, FORWARD, OPTIMIZER, CpuAccount
from benchmarks.jobs.gpt import GPT, fingerprint
from benchmarks.jobs.stopwatch import Stopwatch


class Trained(pl.LightningModule):
    """The model with its loss and optimizer.

    Args:
        size: size of the model.
        sharded: whether FSDP2 shards it.
        pace_s: pause in each step, in seconds.
    """

    def __init__(self, size: str, *, sharded: bool = False, pace_s: float = 0.0) -> None:
        super().__init__()
        self.model = GPT(size)
        self.sharded, self.pace_s = sharded, pace_s

    def configure_model(self) -> None:
        if self.sharded and self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - one variant only

            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        if self.pace_s:
            time.sleep(self.pace_s)
        loss: Tensor = self.model(batch[0])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class StepReporter(pl.Callback):
    """Report every finished step, and every version that is committed on all ranks."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        probes: list[Callable[[str, Any], None]] | None = getattr(trainer.strategy, "probes", None)
        if probes is not None:
            probes.append(self.mirrored)

    def mirrored(self, moment: str, version: Any) -> None:
        if moment == "committed":
            self.wire.send("committed", step=version.optimizer_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self.wire.send("train", step=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, Trained)
        engine: Any = getattr(trainer.strategy, "engine", None)
        self.wire.send(
            "step", step=trainer.global_step, rank=trainer.global_rank, world=trainer.world_size,
            attempt=0 if engine is None else engine.generation,
            fingerprint=0 if pl_module.sharded else fingerprint(pl_module.model, trainer.optimizers[0]),
        )  # fmt: skip


class Segment:
    """The steps since the last turn; in a separate class, because a version would contain plain values."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.starts = [time.perf_counter()]
        self.account = CpuAccount()


class Turns(pl.Callback):
    """Train in segments, and wait between two until it is this job's turn again.

    The end of a segment is reported with the time of each step, from the start of its batch to the start of the next,
    with the CPU time of its sections, and the measurements of the stopwatch.
    """

    ckptless_observer = True
    """No version contains the measurements: they change with every step, and to capture them would be measured too."""

    def __init__(self, wire: Wire, stopwatch_class: type[Stopwatch] = Stopwatch) -> None:
        self.wire = wire
        self.segment = Segment(0)
        self.stopwatch: Stopwatch | None = None
        self._stopwatch_class = stopwatch_class

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.segment.account.end(BETWEEN)
        self.segment.starts.append(time.perf_counter())
        if not self.segment.left:
            self.wait_for_turn(trainer)
        self.segment.left -= 1

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        self.segment.account.end(FORWARD)

    def on_after_backward(self, *_: Any, **__: Any) -> None:
        self.segment.account.end(BACKWARD)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.segment.account.end(OPTIMIZER)

    def wait_for_turn(self, trainer: pl.Trainer) -> None:
        segment = self.segment
        steps = len(segment.starts) - 1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self.wire.send(
            "ready",
            steps_s=[after - before for before, after in pairwise(segment.starts)],
            mean_s=(time.perf_counter() - segment.starts[0]) / steps if steps else 0.0,
            cpu_s=segment.account.spent(),
            **(self.stopwatch.take() if self.stopwatch else {}),
        )
        steps = int(self.wire.receive()["steps"])
        if hasattr(trainer.strategy, "engine"):
            self.stopwatch = self.stopwatch or self._stopwatch_class(trainer.strategy.engine)
            self.stopwatch.attach()
        self.segment = Segment(steps)
