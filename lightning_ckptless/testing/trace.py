"""A digest of every step of every rank: what two runs are compared by.

Each rank appends to `trace-rank<r>.jsonl`, one JSON object per line. A line that a dying process left unfinished is
closed by the next generation, which writes the steps that are run again once more.

| `kind` | Written | Digests and values |
|---|---|---|
| `begin` | when training begins, in each generation | where the loggers write |
| `batch` | after each batch | batch, each tensor by name, generators; learning rates, logged values |
| `validation` | after each validation | generators; logged values |
| `epoch` | at the end of each epoch | parameters, generators |
| `end` | when `fit` ends | as `batch`, and loops, schedulers, precision, each callback; logged values |
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning.distribution import DISTRIBUTIONS, is_a, module
from lightning_ckptless.testing.digest import digest_tensors, digest_values


class TraceFile:
    """Appends JSON lines to a file.

    Args:
        path: of the file; its folder is made if missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line at once, not through a buffer that would die with the process."""
        os.write(self._handle, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


OWN_PREFIX = "ckptless/"
"""Of values that we log about ourselves: they depend on time."""


def step_trace_from_environment(distribution: str) -> Any | None:
    """A trace into `CKPTLESS_TRACE_DIR`; None where it is not set.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    folder = os.environ.get(environment.TRACE_DIR, "")
    return step_trace_class(distribution)(folder) if folder else None


@lru_cache(maxsize=len(DISTRIBUTIONS))
def step_trace_class(distribution: str) -> type[Any]:
    """`StepTrace` for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = module(distribution, "callbacks").Callback

    class StepTrace(base):  # type: ignore[misc]
        """Writes a digest of every step; reads only, and draws no random number.

        Args:
            folder: of the traces; made if missing.
        """

        ckptless_observer = True

        def __init__(self, folder: str | Path) -> None:
            self._recorder = Recorder(Path(folder))

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._recorder.open(trainer)
            self._recorder.write("begin", trainer, loggers=loggers_of(trainer))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            digests = {"batch": digest_values(batch), **tensors_of(trainer), **generators()}
            self._recorder.write("batch", trainer, batch=batch_idx, digests=digests, values=values_of(trainer))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self._recorder.write("validation", trainer, digests=generators(), values=logged(trainer))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            digests = {**parameters_of(trainer), **generators()}
            self._recorder.write("epoch", trainer, digests=digests)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            digests = {**tensors_of(trainer), **generators(), **bookkeeping(trainer)}
            self._recorder.write("end", trainer, digests=digests, values=values_of(trainer))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self._recorder.close()

    StepTrace.__module__ = "lightning_ckptless.testing"
    StepTrace.__qualname__ = "StepTrace"
    return StepTrace


class Recorder:
    """The trace file of one rank, open while `fit` runs.

    Args:
        folder: of the traces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TraceFile | None = None
        self._engine: Any = None

    def open(self, trainer: Any) -> None:
        """Find out who writes, and open the file."""
        self._engine = getattr(trainer.strategy, "engine", None)
        self._file = TraceFile(self.folder / f"trace-rank{trainer.global_rank}.jsonl")

    def write(self, kind: str, trainer: Any, **fields: Any) -> None:
        """Append a line; nothing outside of `fit`."""
        if self._file is not None:
            where = {"epoch": trainer.current_epoch, "step": trainer.global_step, "at": time.time()}
            engine = self._engine
            who = {"fit": engine.fit_index if engine else 0, "generation": engine.generation if engine else 0}
            self._file.append({"kind": kind, **who, **where, **fields})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


# ---------------------------------------------------------------------- what a run is made of


def tensors_of(trainer: Any) -> dict[str, str]:
    """A digest of every parameter and buffer and of all that the optimizers keep for each parameter, by name."""
    module = trainer.lightning_module
    buffers = {f"buffer {name}": digest_tensors({name: buffer}) for name, buffer in module.named_buffers()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {**parameters_of(trainer), **buffers}
    for index, optimizer in enumerate(trainer.optimizers):
        found |= {f"optimizer {index} {name}": digest for name, digest in optimizer_state(optimizer, names).items()}
    return found


def parameters_of(trainer: Any) -> dict[str, str]:
    """A digest of every parameter, by name."""
    named = trainer.lightning_module.named_parameters()
    return {f"parameter {name}": digest_tensors({name: parameter}) for name, parameter in named}


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> dict[str, str]:
    """A digest of the settings of every group, and of the state that is kept for every parameter.

    Args:
        optimizer: to be read.
        names: of the parameters by their `id`; others are numbered.
    """
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        found[f"group {index}"] = digest_values({key: value for key, value in group.items() if key != "params"})
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group {index} parameter {place}")
            found[name] = digest_values(dict(optimizer.state.get(parameter, {})))
    return found


def generators() -> dict[str, str]:
    """Digests of the global random number generators."""
    found = {
        "python_rng": digest_values(random.getstate()),
        "numpy_rng": digest_values(np.random.get_state(legacy=True)),
        "torch_rng": digest_values(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda_rng"] = digest_values(torch.cuda.get_rng_state())
    return found


def values_of(trainer: Any) -> dict[str, str]:
    """Learning rates and logged values, as text that is equal only where the numbers are."""
    rates = {
        f"lr[{i}][{j}]": repr(float(group["lr"]))
        for i, optimizer in enumerate(trainer.optimizers)
        for j, group in enumerate(optimizer.param_groups)
        if "lr" in group
    }
    return rates | logged(trainer)


def logged(trainer: Any) -> dict[str, str]:
    """What the program has logged up to now, as callbacks see it."""
    metrics: Mapping[str, Any] = trainer.callback_metrics
    return {name: repr(float(metrics[name])) for name in sorted(metrics) if not name.startswith(OWN_PREFIX)}


def bookkeeping(trainer: Any) -> dict[str, str]:
    """Digests of loop counters, schedulers, precision and callbacks."""
    places = [place for place in (log.get("log_dir") for log in loggers_of(trainer)) if place]
    found = {
        "loops": digest_values(trainer.fit_loop.state_dict()),
        "schedulers": digest_values([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "precision": digest_values(trainer.precision_plugin.state_dict()),
    }
    for position, callback in enumerate(trainer.callbacks):
        if not hasattr(callback, "ckptless_observer") and not is_a(callback, "callbacks", "Timer"):
            state = without_places(callback.state_dict(), places)
            found[f"callback {position} ({type(callback).__name__})"] = digest_values(state)
    return found


def loggers_of(trainer: Any) -> list[dict[str, str | None]]:
    """Kind and folder of each logger; nothing on other ranks than 0, where asking would choose a new folder."""
    if not trainer.is_global_zero:
        return []
    return [
        {"kind": type(logger).__name__, "log_dir": _absolute(getattr(logger, "log_dir", None))}
        for logger in trainer.loggers
    ]


def _absolute(folder: Any) -> str | None:
    return os.path.abspath(folder) if isinstance(folder, str | Path) else None


def without_places(value: Any, places: list[str]) -> Any:
    """A copy of nested data in which paths do not tell where a run has put its files.

    A path into the folder of a logger becomes relative to it. Of any other path the name alone is left, without the
    number that `ModelCheckpoint` adds where another run has written the same name into the same folder.
    """
    if isinstance(value, Mapping):
        return {without_places(k, places): without_places(v, places) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, places) for item in value]
    if not isinstance(value, str) or os.sep not in value:
        return value
    path = os.path.abspath(value)
    for place in places:
        if path.startswith(place + os.sep) or path == place:
            return os.path.relpath(path, place)
    stem, extension = os.path.splitext(os.path.basename(path))
    head, _, tail = stem.rpartition("-v")
    return f"{head if head and tail.isdigit() else stem}{extension}"
