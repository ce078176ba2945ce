"""A trainer call in a notebook: its workers are forked from the notebook's process, which becomes their agent.

The cell runs until the workers have finished. Objects defined in cells need not be importable, because replacements are
forked from the state at the call as well. When the call returns, the trained state is in the notebook's own trainer and
model.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.errors import LaunchError, OptionsError, WorkerError
from lightning_ckptless.internals.lightning.call_outcome import (
    capture,
    elastic_environment,
    restore,
    without_predictions,
)
from lightning_ckptless.internals.lightning.distribution import distribution_of
from lightning_ckptless.internals.lightning.launch import is_stop
from lightning_ckptless.internals.lightning.log_files import keep_logs
from lightning_ckptless.membership.agent.scratch import ScratchFolder
from lightning_ckptless.membership.agent.signals import AskedToEnd
from lightning_ckptless.membership.forkserver.forked_call import THE_CALL, ForkedParent
from lightning_ckptless.membership.forkserver.output_relay import OutputRelay
from lightning_ckptless.membership.forkserver.server import loses_cuda
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.trainer.strategy.recoverable import CkptlessMixin

RUN_A_FILE = (
    "write the cells to a file and run that: put `%%writefile train.py` first in the cell, then run "
    "`!ckptless run --nproc-per-node {ranks} train.py` in another cell"
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""OpenMP's threads do not survive a fork: if the forked process has used them, a worker that asks for more than one
thread blocks forever."""
_RESULT = "result.pt"


@dataclass(frozen=True)
class NotebookCall:
    """One trainer call.

    Args:
        strategy: strategy of the trainer.
        launch: runs a function of the trainer in a worker.
        function: function to run.
        args: arguments of the function.
        kwargs: keyword arguments of the function.
        trainer: trainer that is called; None for a function without one.
    """

    strategy: CkptlessMixin
    launch: Callable[..., Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trainer: Any

    def run(self, run_root: Path) -> Any:
        """Run the function in workers and copy their state back. Returns what it returned on rank 0.

        Args:
            run_root: folder in which the run's folder is created.

        Raises:
            OptionsError: a setting is not supported in a notebook.
            LaunchError: workers cannot be forked, or ended without an exception of their own.
            KeyboardInterrupt: the user has stopped the cell.
        """
        strategy = self.strategy
        require_forks_can_train(strategy)
        call = replace(self, args=without_predictions(self.function, self.args))
        config = LaunchConfig(
            program=THE_CALL,
            nproc=strategy.num_processes,
            run_root=run_root,
            arena_dir=None if strategy.options.arena_dir is None else Path(strategy.options.arena_dir),
            env=ONE_THREAD,
            # Nothing to preload: the notebook's process has already imported everything.
            preload_imports=False,
        )
        with ScratchFolder("notebook") as scratch:
            exchange = Exchange(scratch.path)
            try:
                with (
                    first_interrupt_finishes_the_step(),
                    OutputRelay() as relay,
                    ForkedParent(lambda: call.work(exchange), relay.output) as parent,
                ):
                    outcome = strategy.parts.run_job(config, parent=parent)
            except AskedToEnd:
                self._restore_outcome(exchange)
                raise KeyboardInterrupt from None
            result = self._restore_outcome(exchange)
            if outcome.exit_code:
                raise exchange.error_of(outcome)
            return result

    def work(self, exchange: Exchange) -> None:
        """Run as a worker, in a process that was forked for it.

        Args:
            exchange: receives the outcome on this rank.
        """
        strategy, trainer = self.strategy, self.trainer
        strategy.cluster_environment = elastic_environment(distribution_of(strategy))
        strategy.set_world_ranks()
        if strategy.has_restored_outcome and strategy.global_rank == 0:
            # Continue the files of an earlier call; a logger that reopened them would start new ones instead.
            keep_logs(trainer)
        try:
            result = self.launch(exchange.recording_errors(self.function), *self.args, trainer=trainer, **self.kwargs)
            self._store_outcome(exchange, result)
        except BaseException as error:
            if is_stop(error):
                self._store_outcome(exchange, None)
            exchange.store_error(error)
            raise

    def _store_outcome(self, exchange: Exchange, result: Any) -> None:
        captured = None if self.trainer is None else capture(self.trainer)
        if self.strategy.global_rank == 0:
            exchange.store_result(result, captured)

    def _restore_outcome(self, exchange: Exchange) -> Any:
        result, captured = exchange.load_result()
        if captured is not None:
            restore(self.trainer, captured)
            self.strategy.has_restored_outcome = True
        return result


class Exchange:
    """Files through which workers return their outcome, in a folder that only this user can access.

    Args:
        folder: folder created by the notebook's process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._raised_at = math.inf

    def store_result(self, result: Any, captured: dict[str, Any] | None) -> None:
        """Store what the call returned and the state of its trainer, replacing an earlier result."""
        draft = self._folder / f"{_RESULT}.part"
        torch.save((result, captured), draft)
        draft.rename(self._folder / _RESULT)

    def load_result(self) -> tuple[Any, dict[str, Any] | None]:
        """The stored result with its tensors in host memory; None if there is none."""
        path = self._folder / _RESULT
        if not path.exists():
            return None, None
        found: tuple[Any, dict[str, Any] | None] = torch.load(path, map_location="cpu", weights_only=False)
        return found

    def recording_errors(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to record when it raises, before that affects other workers."""

        @wraps(function)
        def recording(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BaseException:
                self._raised_at = time.time()
                raise

        return recording

    def store_error(self, error: BaseException) -> None:
        """Store the exception that ends this worker."""
        text = "".join(traceback.format_exception(error))
        data = pickle.dumps((self._raised_at, _pickled(error), text))
        (self._folder / f"error-{os.getpid()}").write_bytes(data)

    def error_of(self, outcome: Outcome) -> BaseException:
        """The exception that ended a run: the first one raised by any worker."""
        left = [pickle.loads(path.read_bytes()) for path in self._folder.glob("error-*")]
        if left:
            _, data, text = min(left, key=lambda facts: facts[0])
            error = LaunchError(text.strip().splitlines()[-1]) if data is None else pickle.loads(data)
            error.__cause__ = WorkerError(text)
            assert isinstance(error, BaseException)
            return error
        fault = f": {outcome.faults[-1]}" if outcome.faults else ""
        return LaunchError(f"the workers ended with exit code {outcome.exit_code}{fault}; see their output above")


def _pickled(error: BaseException) -> bytes | None:
    """An exception as another process can load it; None if its class does not support that."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # noqa: BLE001 - classes of the script decide how they are pickled, and what that raises
        return None
    return data


def require_forks_can_train(strategy: CkptlessMixin) -> None:
    """Refuse what cannot run in forks of this process.

    Args:
        strategy: strategy of the trainer.

    Raises:
        OptionsError: a setting of the strategy rules it out.
        LaunchError: CUDA is in use in this process.
    """
    instead = RUN_A_FILE.format(ranks=strategy.num_processes)
    if strategy.num_nodes > 1:
        raise OptionsError(
            f"num_nodes={strategy.num_nodes}: the workers of a notebook are forks of its process, all on this node. "
            f"Set num_nodes=1, or {instead} on each node (see the guide on clusters)"
        )
    if not strategy.replicates:
        raise OptionsError(
            f"{type(strategy).__name__} in a notebook: each worker holds a part of the model, which cannot be copied "
            f"back into the notebook's own. Choose strategy='ckptless', or {instead}"
        )
    if strategy.root_device.type == "cuda" and loses_cuda():
        raise LaunchError(
            "CUDA is in use in the notebook's process, and a fork of it could not use it: restart the kernel, and "
            "before fit run nothing that touches a GPU (tensor.cuda(), model.to('cuda'), torch.cuda.is_available()); "
            f"or {instead}"
        )


@contextmanager
def first_interrupt_finishes_the_step() -> Iterator[None]:
    """Context in which the first SIGINT ends the run after the current step, like SIGTERM, and the next one at once.

    Has no effect outside the main thread, where signal handlers cannot be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise AskedToEnd(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
