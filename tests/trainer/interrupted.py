"""A run that stops at a version and continues in a fresh trainer, in one process: exactness without faults."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning.log_files import cut_logs, log_positions, watch_logs
from lightning_ckptless.internals.lightning.logger_identity import identity_of, set_identity
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.data.loader import make_resumable
from lightning_ckptless.trainer.data.position import move_data_to
from lightning_ckptless.trainer.recovery.fit_resume import run_restored
from lightning_ckptless.trainer.recovery.restoration import restore_structure
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.rng import apply_rng
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.state.tensors import StateIndex, make_room_for_buffers, make_room_for_optimizer_state
from tests.lab.parts import Options, make_run


class Interruption(BaseException):
    """Raised where the run is interrupted."""


class Track(pl.Callback):
    """Records every batch, epoch and validation, bit for bit."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = float(torch.cat([p.detach().reshape(-1).double() for p in module.parameters()]).sum()).hex()
        data = [float(t.double().sum()).hex() for t in _tensors(batch)]
        rng = (float(torch.rand(1)).hex(), random.random().hex(), float(np.random.rand()).hex())
        lrs = [g["lr"] for o in trainer.optimizers for g in o.param_groups]
        self.rows.append(("batch", trainer.global_step, trainer.current_epoch, batch_idx, weights, data, rng, lrs))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.rows.append(("epoch", trainer.current_epoch, _values(trainer.callback_metrics)))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.rows.append(("validation", trainer.global_step, _values(trainer.callback_metrics)))


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [t for item in batch for t in _tensors(item)] if isinstance(batch, list | tuple) else [batch]


def _values(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((name, float(value).hex()) for name, value in metrics.items())


class OneProcess(SingleDeviceStrategy):
    """Commits and restores without replicas: the version is kept in this process."""

    strategy_name = "one_process"

    def __init__(self, stop_at: Version | None = None, saved: dict[str, Any] | None = None) -> None:
        super().__init__(device="cpu")
        self.stop_at, self.saved, self.versions = stop_at, saved, list[Version]()
        self.taken: dict[str, Any] = {}

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        watch_logs(trainer.loggers)
        self.trainer, self.loops = trainer, FitLoops(trainer)
        since = self.saved["version"] if self.saved else None
        StepBoundaries(self.loops, self.commit, every_n_steps=lambda: 1, since=since)
        self.host_state: HostState | None = None
        self.surroundings = Surroundings(trainer, lambda _: None)
        self.loops.after_setup_of_validation_data(self.surroundings.on_validation_data)
        if self.saved:
            self.loops.fit.run = lambda: run_restored(self.loops, self.restore)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.surroundings.watch_objects()

    def commit(self, version: Version) -> None:
        self.versions.append(version)
        self.host_state = self.host_state or HostState(self.trainer, surroundings=self.surroundings)
        host_state = pack(self.host_state.capture())
        if version == self.stop_at:
            tensors = {name: t.detach().clone() for name, t in StateIndex(self.trainer).read().items()}
            loggers = self.trainer.loggers
            self.taken = {
                "version": version,
                "host_state": host_state,
                "tensors": tensors,
                "loggers": [identity_of(logger) for logger in loggers],
                "logs": log_positions(loggers),
            }
            raise Interruption

    def restore(self, start_hooks: Callable[[], None]) -> Version:
        assert self.saved
        self.fill()
        start_hooks()
        self.settle()
        version: Version = self.saved["version"]
        return version

    def fill(self) -> None:
        assert self.saved
        restore_structure(self.trainer, unpack(self.saved["host_state"]))
        tensors = self.saved["tensors"]
        described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        optimizer = {name: facts for name, facts in described.items() if name.startswith("optimizer/")}
        make_room_for_buffers(self.trainer, described)
        make_room_for_optimizer_state(self.trainer, optimizer)
        live = StateIndex(self.trainer).read()
        assert {*live} == {*tensors}
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(tensors[name])
        self.host_state = HostState(self.trainer, surroundings=self.surroundings)
        self.host_state.apply(unpack(self.saved["host_state"]), with_settings=False)

    def settle(self) -> None:
        assert self.saved and self.host_state
        host_state = unpack(self.saved["host_state"])
        self.host_state.apply(host_state)
        self.loops.set_sampler_epochs()
        move_data_to(self.loops, host_state["data"])
        apply_rng(host_state["rng"])


@dataclasses.dataclass
class Outcome:
    """What is compared: every batch, epoch and validation, the final weights, the rows in the log file."""

    rows: list[Any]
    weights: dict[str, torch.Tensor]
    log_rows: list[str]
    versions: list[Version]


def run(options: Options, root: Path, stop_at: Version | None = None, saved: dict[str, Any] | None = None) -> Any:
    """Run once; return the outcome and, if the run was stopped, what was captured at the version."""
    strategy = OneProcess(stop_at, saved)
    return fit(options, root, strategy, saved), strategy.taken


def fit(options: Options, root: Path, strategy: Any, saved: dict[str, Any] | None = None) -> Outcome:
    """Run under a single-device strategy."""
    options, track = dataclasses.replace(options, devices=1, root=str(root)), Track()
    trainer, model, data = make_run(options, strategy, (track,))
    if isinstance(strategy, OneProcess):
        FitLoops(trainer).iterate_data_through(make_resumable)
    if saved:
        for logger, identity in zip(trainer.loggers, saved["loggers"], strict=True):
            set_identity(logger, identity)
        cut_logs(trainer, saved["logs"])
        trainer.num_sanity_val_steps = 0
    try:
        trainer.fit(model, datamodule=data)
    except Interruption:
        pass
    finally:
        _close_workers(trainer)
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return Outcome(track.rows, weights, _log_rows(root), getattr(strategy, "versions", []))


def _close_workers(trainer: Any) -> None:
    loader: Any = trainer.fit_loop._combined_loader
    if loader is not None:
        loader.reset()


def _log_rows(root: Path) -> list[str]:
    return [line for path in sorted(root.rglob("metrics.csv")) for line in path.read_text().splitlines()]


def interrupted(options: Options, root: Path, at: Version, fresh: Callable[[], None] | None = None) -> Outcome:
    """Stop at a version, continue from it in a fresh trainer, and join the two halves."""
    first, taken = run(options, root, stop_at=at)
    assert taken, f"the run never reached {at}: {first.versions}"
    # A new process has different generator states from the stopped one.
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    second, _ = run(options, root, saved=taken)
    # The rows recorded before the stop were restored with the state: the callback's list is plain data.
    return Outcome(second.rows, second.weights, second.log_rows, first.versions + second.versions)
