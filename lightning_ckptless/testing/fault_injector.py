"""Fault injection: kills, hangs or breaks a rank at a chosen step and moment, once per run.

| Moment | When, in the optimizer step `S` of the fault |
|---|---|
| `training_step` | the body of `training_step` has run but has not returned |
| `backward` | the first gradient has been computed, the others have not |
| `optimizer_step` | the optimizer has changed the parameters, the rest of the step is still to come |
| `commit` | the step is done, its version has not been captured |
| `mirror` | the version is being copied into the arena, in the background |
| `accumulation` | a batch is done whose gradients are accumulated |
| `validation` | the validation after the step has started |
| `epoch_end` | the last step of the epoch is done, the end of the epoch is being processed |
| `regroup` | after another fault at this or a later step, before the rendezvous in place |
| `connect` | all ranks have joined that rendezvous, and the others are creating the process groups |
| `restore` | after that rendezvous, before the state is restored |
| `rewind` | after all ranks have decided to rewind from this or a later step, before the state is restored |
| `go_back` | the version that they go back to is committed again, those of the abandoned branch are being discarded |

Steps count from 1 like `trainer.global_step`: with manual optimization and two optimizers, a batch makes two steps. A
fault whose moment does not occur in its step (no validation follows it, its version is not mirrored) is injected at the
next such moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.fault_script import Fault, FaultKind, Moment, parse_faults
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.testing.bit_flip import flip, require_tensor
from lightning_ckptless.testing.fault_marks import FaultMarks
from lightning_ckptless.testing.wrong_products import compute_wrongly
from lightning_ckptless.trainer.state.sharding import sharded_modules
from lightning_ckptless.trainer.state.tensors import StateIndex
from lightning_ckptless.trainer.strategy.world_size import range_of_nodes

Remove = Callable[[], None]


class FaultInjectorMixin:
    """Injects faults into training, as a callback; see `lightning_ckptless.testing.fault_injector` for the moments.

    Each fault is injected once per run, however often the workers are relaunched.

    Args:
        faults: faults as text (`kill:rank=1:step=7:at=backward`, several separated by commas), or as `Fault`
            objects.
        marker_dir: folder that records over relaunches which faults were injected; defaults to `faults` in the run
            folder. Required with strategies other than ckptless.

    Raises:
        OptionsError: the faults cannot be parsed.
    """

    ckptless_observer = True

    def __init__(self, faults: str | Sequence[Fault], marker_dir: str | Path | None = None) -> None:
        self._injection = Injection(_as_faults(faults), None if marker_dir is None else Path(marker_dir))

    @classmethod
    def from_environment(cls) -> Self | None:
        """Create an injector for the faults in `CKPTLESS_FAULTS`; None if there are none.

        Raises:
            OptionsError: the faults cannot be parsed.
        """
        text = os.environ.get(environment.FAULTS, "")
        return cls(text) if text.strip() else None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Select the faults of this rank."""
        self._injection.open(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Install hooks for faults within the batch."""
        self._injection.arm(trainer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Install hooks for faults within the backward pass of a sharded model."""
        self._injection.arm_backward(trainer, pl_module, loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remove the hooks, and inject what is due after a batch."""
        self._injection.disarm()
        self._injection.after_batch(trainer, batch_idx)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Inject what is due in validation."""
        if not trainer.sanity_checking:
            self._injection.strike(Moment.VALIDATION, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Inject what is due at the end of an epoch."""
        self._injection.strike(Moment.EPOCH_END, trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove all hooks."""
        self._injection.close()


def _as_faults(faults: str | Sequence[Fault]) -> tuple[Fault, ...]:
    return parse_faults(faults) if isinstance(faults, str) else tuple(faults)


class Injection:
    """The fault injection of one process.

    Args:
        faults: all faults of the run, including those of other ranks.
        marker_dir: folder of the marks; None for the default in the run folder.
    """

    def __init__(self, faults: tuple[Fault, ...], marker_dir: Path | None) -> None:
        self.faults = faults
        self._marker_dir = marker_dir
        self._mine: tuple[tuple[int, Fault], ...] = ()
        self._marks: FaultMarks | None = None
        self._record: Callable[..., None] = _no_ledger
        self._removers: list[Remove] = []
        self._probes: list[Callable[[str, Version], None]] = []
        self._newest_step = 0
        self._ask_to_rewind: Callable[..., None] = _no_ledger
        self._flip: Callable[[Fault], None] = _no_ledger
        self._is_wrong = False

    def open(self, trainer: Any) -> None:
        """Select the faults of this rank, and register for the moments of mirroring and recovery.

        Raises:
            OptionsError: a fault names a rank or a tensor that does not exist, or there is no folder for the marks.
        """
        most = _largest_world_size(trainer)
        for fault in self.faults:
            if fault.rank != "all" and not 0 <= int(fault.rank) < most:
                raise OptionsError(f"{fault}: rank {fault.rank} does not exist, the world size is {most}")
        _require_tensors(self.faults, trainer)
        self._flip = lambda fault: flip(fault, StateIndex(trainer).read())
        rank = trainer.global_rank
        self._mine = tuple((i, fault) for i, fault in enumerate(self.faults) if fault.rank in (rank, "all"))
        engine = getattr(trainer.strategy, "engine", None)
        session = None if engine is None else engine.session
        folder = self._marker_dir or (None if session is None else session.run_folder / "faults")
        if folder is None:
            raise OptionsError(
                f"FaultInjector with {type(trainer.strategy).__name__}: set marker_dir= to a folder that records over "
                "relaunches which faults were injected"
            )
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        # Before the rendezvous, a process has no generation. Its process id serves as a unique number instead.
        no_generation = -os.getpid()
        self._marks = FaultMarks(folder, lambda: (session.generation or no_generation) if session else restarts, rank)
        if session is not None:
            self._ask_to_rewind = trainer.strategy.ask_to_rewind
            self._record = lambda event, **fields: session.ledger.record(
                event, generation=session.generation, rank=rank, **fields
            )
            self._probes = session.probes
            self._probes.append(self._probe)

    def close(self) -> None:
        """Remove all hooks."""
        self.disarm()
        with suppress(ValueError):
            self._probes.remove(self._probe)

    # ------------------------------------------------------------------ moments

    def arm(self, trainer: Any, pl_module: Any) -> None:
        """Install hooks for faults that are due in the batch that starts."""
        self.disarm()
        step = trainer.global_step + 1
        strike = self.strike
        self._is_wrong = self._is_wrong or self._becomes_wrong(step)
        if self._is_wrong:
            self._removers.append(compute_wrongly())
        if self._due(Moment.TRAINING_STEP, step):
            self._removers.append(after_training_step(pl_module, lambda: strike(Moment.TRAINING_STEP, step)))
        if self._due(Moment.BACKWARD, step) and not sharded_modules(pl_module):
            parameters = [p for p in pl_module.parameters() if p.requires_grad]
            hook = torch.autograd.graph.register_multi_grad_hook(
                parameters, lambda _: strike(Moment.BACKWARD, step), mode="any"
            )
            self._removers.append(hook.remove)
        if self._due(Moment.OPTIMIZER_STEP, step):
            self._removers += after_optimizers(
                trainer.optimizers, lambda: strike(Moment.OPTIMIZER_STEP, trainer.global_step + 1)
            )

    def arm_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Install hooks for the backward pass of a sharded model, whose graph does not refer to its own parameters."""
        step = trainer.global_step + 1
        if self._due(Moment.BACKWARD, step) and sharded_modules(pl_module):
            nodes = gradient_nodes(loss)
            self._removers += [
                node.register_hook(lambda *_: self.strike(Moment.BACKWARD, step)).remove for node in nodes
            ]

    def disarm(self) -> None:
        """Remove the hooks of a batch."""
        while self._removers:
            self._removers.pop()()

    def after_batch(self, trainer: Any, batch_idx: int) -> None:
        """Inject what is due after a batch, which ends an optimizer step unless gradients are accumulated."""
        accumulated, self._newest_step = trainer.accumulate_grad_batches, trainer.global_step
        if (batch_idx + 1) % accumulated == 0 or trainer.is_last_batch:
            self.strike(Moment.COMMIT, trainer.global_step)
        else:
            self.strike(Moment.ACCUMULATION, trainer.global_step + 1)

    def _probe(self, moment: str, version: Version) -> None:
        if moment == "stage":
            self.strike(Moment.MIRROR, version.optimizer_step)
        elif moment in (Moment.REGROUP, Moment.CONNECT, Moment.RESTORE):
            self.strike(Moment(moment), version.optimizer_step)
        elif moment in (Moment.REWIND, Moment.GO_BACK):
            self.strike(Moment(moment), self._newest_step)

    def _due(self, moment: Moment, step: int) -> list[tuple[int, Fault]]:
        due = ((i, fault) for i, fault in self._mine if fault.at == moment and fault.step <= step)
        return [(i, fault) for i, fault in due if fault.kind is not FaultKind.WRONG]

    def _becomes_wrong(self, step: int) -> bool:
        """Whether this process computes wrongly from the batch on that starts."""
        due = [(i, fault) for i, fault in self._mine if fault.kind is FaultKind.WRONG and fault.step <= step]
        return any(self._is_to_be_injected(index, fault, "batch", step) for index, fault in due)

    def _is_to_be_injected(self, index: int, fault: Fault, moment: str, step: int) -> bool:
        assert self._marks is not None
        if not self._marks.claim(index, fault):
            return False
        self._record("fault_injected", fault=str(fault), kind=str(fault.kind), moment=moment, step=step)
        return True

    def strike(self, moment: Moment, step: int) -> None:
        """Inject the faults that are due at a moment of a step and have not been injected yet."""
        for index, fault in self._due(moment, step):
            if self._is_to_be_injected(index, fault, str(moment), step):
                if fault.kind is FaultKind.REWIND:
                    self._ask_to_rewind("injected", to_step=fault.to, steps=None, skip_batches=fault.skip)
                elif fault.kind is FaultKind.FLIP:
                    self._flip(fault)
                else:
                    inject(fault, step)


def _largest_world_size(trainer: Any) -> int:
    """Number of ranks when all nodes of an elastic run are present; else the world size."""
    _, most = range_of_nodes(1)
    return max(int(trainer.world_size), most * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _require_tensors(faults: Iterable[Fault], trainer: Any) -> None:
    """Refuse flips in tensors that do not exist. Optimizers create theirs in the first step."""
    flips = [each for each in faults if each.kind is FaultKind.FLIP and not each.tensor.startswith("optimizer/")]
    known = StateIndex(trainer).tensors() if flips else {}
    for each in flips:
        require_tensor(each, known)


def _no_ledger(event: object, **fields: Any) -> None:
    """Discard an event: other strategies have no ledger."""


def after_training_step(pl_module: Any, action: Callable[[], None]) -> Remove:
    """Call an action after the body of `training_step`; returns a function that removes the hook."""
    original = pl_module.training_step

    @wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action()
        return result

    def remove() -> None:
        vars(pl_module).pop("training_step", None)

    pl_module.training_step = training_step
    return remove


def gradient_nodes(loss: torch.Tensor) -> Iterator[Any]:
    """Yield the nodes of a loss's graph that accumulate gradients of parameters."""
    pending, seen = [loss.grad_fn], set[Any]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node
        pending += [following for following, _ in node.next_functions]


def after_optimizers(optimizers: Iterable[Any], action: Callable[[], None]) -> list[Remove]:
    """Call an action after each optimizer's `step`; returns functions that remove the hooks."""
    return [optimizer.register_step_post_hook(lambda *_: action()).remove for optimizer in optimizers]


EXIT_CODE = 3
"""Exit code of an `exit` fault."""


class InjectedError(RuntimeError):
    """Raised by a `raise` fault."""


def inject(fault: Fault, step: int) -> NoReturn:
    """Inject a fault into this process.

    Args:
        fault: fault to inject.
        step: current optimizer step.

    Raises:
        InjectedError: the fault is of the kind `raise`.
    """
    if fault.kind == "raise":
        raise InjectedError(f"injected at step {step}: {fault}")
    sys.stdout.flush()
    sys.stderr.flush()
    if fault.kind == "exit":
        os._exit(EXIT_CODE)
    if fault.kind == "leave":
        os._exit(0)
    if fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "node":
        lose_node()
    while True:
        # Never set: the rank hangs without using CPU time, like one that is stuck in a driver.
        threading.Event().wait()


def lose_node() -> None:
    """Simulate the loss of this node: kill its agent, with which its workers end, and this process."""
    agent = int(os.environ.get(environment.AGENT, os.getppid()))
    os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
