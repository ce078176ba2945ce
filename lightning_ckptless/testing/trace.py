"""Writes a digest of every step of every rank, by which two runs are compared.

Each rank appends to `trace-rank<r>.jsonl`, one JSON object per line. The next generation ends a line that a dying
process left incomplete, and writes replayed steps again.

| `kind` | Written | Digests and values |
|---|---|---|
| `begin` | when training starts, in each generation | folders of the loggers |
| `batch` | after each batch | batch, each tensor by name, generators; learning rates, logged values |
| `validation` | after each validation | generators; logged values |
| `epoch` | at the end of each epoch | parameters, generators |
| `end` | when `fit` ends | as `batch`, plus loops, schedulers, precision, each callback; logged values |
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.testing.digest import digest_tensors, digest_values
from lightning_ckptless.trainer.state.own_state import is_observer


class TraceFile:
    """Appends JSON lines to a file.

    Args:
        path: path of the file; its folder is created if missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line unbuffered, so that it survives the death of the process."""
        os.write(self._handle, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


OWN_PREFIX = "ckptless/"
"""Prefix of values that we log about ourselves, which depend on time."""


class StepTraceMixin:
    """Writes a digest of every step, as a callback. Changes nothing in the trainer and draws no random numbers.

    Args:
        folder: folder of the traces; created if missing.
    """

    ckptless_observer = True

    def __init__(self, folder: str | Path) -> None:
        self._recorder = Recorder(Path(folder))

    @classmethod
    def from_environment(cls) -> Self | None:
        """Create a trace in the folder `CKPTLESS_TRACE_DIR`; None if it is unset."""
        folder = os.environ.get(environment.TRACE_DIR, "")
        return cls(folder) if folder else None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the file of this rank and write `begin`."""
        self._recorder.open(trainer)
        self._recorder.write("begin", trainer, loggers=loggers_of(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write `batch`."""
        digests = {"batch": digest_values(batch), **tensors_of(trainer), **generators()}
        self._recorder.write("batch", trainer, batch=batch_idx, digests=digests, values=values_of(trainer))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write `validation`."""
        if not trainer.sanity_checking:
            self._recorder.write("validation", trainer, digests=generators(), values=logged(trainer))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write `epoch`."""
        digests = {**parameters_of(trainer), **generators()}
        self._recorder.write("epoch", trainer, digests=digests)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write `end`."""
        digests = {**tensors_of(trainer), **generators(), **bookkeeping(trainer)}
        self._recorder.write("end", trainer, digests=digests, values=values_of(trainer))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the file."""
        self._recorder.close()


class Recorder:
    """The trace file of one rank, open while `fit` runs.

    Args:
        folder: folder of the traces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TraceFile | None = None
        self._engine: Any = None

    def open(self, trainer: Any) -> None:
        """Open the file of this rank."""
        self._engine = getattr(trainer.strategy, "engine", None)
        self._file = TraceFile(self.folder / f"trace-rank{trainer.global_rank}.jsonl")

    def write(self, kind: str, trainer: Any, **fields: Any) -> None:
        """Append a line; does nothing outside of `fit`."""
        if self._file is not None:
            where = {"epoch": trainer.current_epoch, "step": trainer.global_step, "at": time.time()}
            session = self._engine.session if self._engine else None
            who = {"fit": session.fit_index if session else 0, "generation": session.generation if session else 0}
            self._file.append({"kind": kind, **who, **where, **fields})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


# ---------------------------------------------------------------------- digests of the state


def tensors_of(trainer: Any) -> dict[str, str]:
    """Return digests of every parameter, buffer and optimizer state, by name."""
    module = trainer.lightning_module
    buffers = {f"buffer {name}": digest_tensors({name: buffer}) for name, buffer in module.named_buffers()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {**parameters_of(trainer), **buffers}
    for index, optimizer in enumerate(trainer.optimizers):
        found |= {f"optimizer {index} {name}": digest for name, digest in optimizer_state(optimizer, names).items()}
    return found


def parameters_of(trainer: Any) -> dict[str, str]:
    """Return digests of every parameter, by name."""
    named = trainer.lightning_module.named_parameters()
    return {f"parameter {name}": digest_tensors({name: parameter}) for name, parameter in named}


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> dict[str, str]:
    """Return digests of the settings of every parameter group and of the state of every parameter.

    Args:
        optimizer: optimizer to read.
        names: names of the parameters by their `id`; others are numbered.
    """
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        found[f"group {index}"] = digest_values({key: value for key, value in group.items() if key != "params"})
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group {index} parameter {place}")
            found[name] = digest_values(dict(optimizer.state.get(parameter, {})))
    return found


def generators() -> dict[str, str]:
    """Return digests of the global random number generators."""
    found = {
        "python_rng": digest_values(random.getstate()),
        "numpy_rng": digest_values(np.random.get_state(legacy=True)),
        "torch_rng": digest_values(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda_rng"] = digest_values(torch.cuda.get_rng_state())
    return found


def values_of(trainer: Any) -> dict[str, str]:
    """Return learning rates and logged values, as text that is equal only if the numbers are."""
    rates = {
        f"lr[{i}][{j}]": repr(float(group["lr"]))
        for i, optimizer in enumerate(trainer.optimizers)
        for j, group in enumerate(optimizer.param_groups)
        if "lr" in group
    }
    return rates | logged(trainer)


def logged(trainer: Any) -> dict[str, str]:
    """Return what the script has logged so far, as visible to callbacks."""
    metrics: Mapping[str, Any] = trainer.callback_metrics
    return {name: repr(float(metrics[name])) for name in sorted(metrics) if not name.startswith(OWN_PREFIX)}


def bookkeeping(trainer: Any) -> dict[str, str]:
    """Return digests of loop counters, schedulers, precision and callbacks."""
    log_dirs = [folder for folder in (log.get("log_dir") for log in loggers_of(trainer)) if folder]
    found = {
        "loops": digest_values(trainer.fit_loop.state_dict()),
        "schedulers": digest_values([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "precision": digest_values(trainer.precision_plugin.state_dict()),
    }
    for position, callback in enumerate(trainer.callbacks):
        if not is_observer(callback) and not is_a(callback, "callbacks", "Timer"):
            state = relative_paths(callback.state_dict(), log_dirs)
            found[f"callback {position} ({type(callback).__name__})"] = digest_values(state)
    return found


def loggers_of(trainer: Any) -> list[dict[str, str | None]]:
    """Return kind and folder of each logger on rank 0; on other ranks, reading the folder would create a new one."""
    if not trainer.is_global_zero:
        return []
    return [
        {"kind": type(logger).__name__, "log_dir": _absolute(getattr(logger, "log_dir", None))}
        for logger in trainer.loggers
    ]


def _absolute(folder: Any) -> str | None:
    return os.path.abspath(folder) if isinstance(folder, str | Path) else None


def relative_paths(value: Any, log_dirs: list[str]) -> Any:
    """Copy nested data with paths that do not depend on where a run writes its files.

    A path into the folder of a logger becomes relative to it. Any other path is reduced to its name, without the suffix
    that `ModelCheckpoint` adds if another run has written the same name to the same folder.
    """
    if isinstance(value, Mapping):
        return {relative_paths(k, log_dirs): relative_paths(v, log_dirs) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [relative_paths(item, log_dirs) for item in value]
    if not isinstance(value, str) or os.sep not in value:
        return value
    path = os.path.abspath(value)
    for folder in log_dirs:
        if path.startswith(folder + os.sep) or path == folder:
            return os.path.relpath(path, folder)
    stem, extension = os.path.splitext(os.path.basename(path))
    head, _, tail = stem.rpartition("-v")
    return f"{head if head and tail.isdigit() else stem}{extension}"
