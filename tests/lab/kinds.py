"""Common kinds of modules, optimizers and callbacks for the lab's run."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import queue
import random
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ckptless import environment

WIDE = 17_000
"""Large enough that the chunks of a frozen weight are compared in place."""


def preempted() -> str:
    """A preemption notice."""
    return "in two minutes"


CHECKS: list[int] = []
"""Health checks of this process."""


def disk_answers() -> None:
    """A health check that passes once in a process, and then fails, on the nodes where LAB_UNFIT names a file.

    The file is made with the third failure.
    """
    CHECKS.append(len(CHECKS))
    if "LAB_UNFIT" in os.environ and len(CHECKS) > 1:
        if len(CHECKS) > 3:
            Path(os.environ["LAB_UNFIT"]).touch()
        raise OSError("the disk does not answer")


class Adapted(nn.Module):
    """Two frozen layers with trained low-rank adapters, two of which share a weight; uses activation checkpointing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, WIDE), nn.Linear(WIDE, width)
        for frozen in (self.up, self.down):
            frozen.requires_grad_(False)
        self.into, self.out = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        self.again = nn.Linear(width, 2, bias=False)
        self.again.weight = self.into.weight
        self.register_buffer("mask", torch.ones(width, WIDE))

    def _checkpointed(self, x: Tensor) -> Tensor:
        base: Tensor = self.down(torch.relu(self.up(x)))
        added: Tensor = self.out(self.into(x) + self.again(x).relu())
        return base + added

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape [batch, width] to the same."""
        y: Tensor = checkpoint(self._checkpointed, x, use_reentrant=False)
        return x + y


class Following(nn.Module):
    """A layer and a moving average of it, which is updated in the forward pass, before the optimizer step.

    Args:
        width: width of input and output.
        how: how the average is written: in place and `counted` by torch, through `data`, or `replaced`.
    """

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer, self.copy = nn.Linear(width, width), nn.Linear(width, width).requires_grad_(False)

    @torch.no_grad()
    def _follow(self) -> None:
        for slow, quick in zip(self.copy.parameters(), self.layer.parameters(), strict=True):
            if self.how == "counted":
                slow.lerp_(quick, 0.1)
            elif self.how == "data":
                slow.data.lerp_(quick, 0.1)
            else:
                slow.data = slow.data.lerp(quick, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape [batch, width] to the same."""
        if self.training:
            self._follow()
        y: Tensor = self.layer(x) - self.copy(x)
        return x + y


class Exchanging(nn.Module):
    """Adds the mean over all ranks, as normalization over the whole batch does."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape [batch, width] to the same."""
        mean = x.detach().mean(0)
        if self.training:
            dist.all_reduce(mean)
        return x + mean


def block_of(kind: str, width: int) -> nn.Module:
    """Return the middle block of a model.

    Args:
        kind: `adapted`, `compiled:BACKEND`, `exchanging`, `following:HOW`, or empty for the identity.
        width: width of input and output.
    """
    if kind == "adapted":
        return Adapted(width)
    if kind == "exchanging":
        return Exchanging()
    if kind.startswith("following:"):
        return Following(width, kind.removeprefix("following:"))
    if kind.startswith("compiled:"):
        block = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        block.compile(backend=kind.removeprefix("compiled:"))
        return block
    return nn.Identity()


class Thaw:
    """Keeps the first layers frozen until a step; a replacement that starts later does not run the unfreezing."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def before_batch(self, part: nn.Module, step: int) -> None:
        """Freeze or unfreeze a part of a model whose optimizer has all parameters."""
        if self.at_step and step in (0, self.at_step):
            part.requires_grad_(step >= self.at_step)


class Rounded(torch.optim.Optimizer):
    """8-bit momentum with scales and counts in tensors, and Python counts per parameter, shared and as an attribute."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of momentum whose length depends on all counts."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        common: Any = self.state
        common["steps"] = int(common["steps"] or 0) + 1
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], common["steps"] + self.calls)
        return loss

    def _update(self, parameter: Tensor, lr: float, counted: int) -> None:
        state = self.state[parameter]
        if not state:
            state["codes"] = torch.full_like(parameter, 128, dtype=torch.uint8)
            state["scale"], state["seen"], state["count"] = torch.tensor(0.0), torch.tensor(0), 0
        assert parameter.grad is not None
        momentum = 0.9 * (state["codes"].float() - 128) * state["scale"] + parameter.grad
        state["scale"].copy_(momentum.abs().max() / 127)
        state["codes"].copy_((momentum / state["scale"].clamp_min(1e-12) + 128).round())
        state["seen"] += 1
        state["count"] += 1
        parameter.add_(momentum, alpha=-lr * (1 + 0.01 * (int(state["seen"]) + state["count"] + counted)))


def two_optimizers(kind: str, body: Iterable[nn.Parameter], head: Iterable[nn.Parameter]) -> list[Any]:
    """Return two optimizers.

    Args:
        kind: `two`, `two_odd` (8-bit state with counts; state before the first step), `two_quick` (fused, foreach).
        body: parameters of the first optimizer.
        head: parameters of the second optimizer.
    """
    if kind == "two_odd":
        return [Rounded(body, 1e-2), torch.optim.Adagrad(head, 1e-2)]
    if kind == "two_quick":
        return [torch.optim.AdamW(body, 1e-2, fused=True), torch.optim.NAdam(head, 1e-2, foreach=True)]
    return [torch.optim.AdamW(body, 1e-2), torch.optim.SGD(head, 1e-2, momentum=0.9)]


def callback_of(kind: str, distribution: Any) -> Any:
    """Return a callback that changes schedulers or parameter groups during a run.

    Args:
        kind: `averaging`, `finetuning`, `searching`, `dying`, `dragging`, `decaying`, `spiking` or `peculiar`.
        distribution: the distribution of Lightning.
    """
    if kind == "spiking":
        return importlib.import_module("lightning_ckptless").RewindOnSpike("watched", factor=3.0, window=4, steps=2)
    if kind == "averaging":
        return distribution.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)

    if kind == "peculiar":
        return peculiar(distribution)
    if kind == "searching":
        return searching(distribution)
    if kind == "dying":
        return dying(distribution)
    if kind == "dragging":
        return dragging(distribution)
    if kind == "decaying":
        return decaying(distribution)

    class Finetuning(distribution.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=1e-3)

    return Finetuning()


def searching(distribution: Any) -> Any:
    """Return a callback that searches the learning rate before training and before the second epoch.

    If faults are injected, rank 1 is killed once during the second search.
    """

    class Searching(distribution.callbacks.LearningRateFinder):
        def __init__(self) -> None:
            super().__init__(min_lr=1e-4, num_training_steps=12)

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.lr = 1e-3

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.on_train_start = partial(kill_once, trainer.global_rank)
                self.lr_find(trainer, pl_module)
                del pl_module.on_train_start

    return Searching()


class Losses(NamedTuple):
    """What is kept of one step."""

    step: int
    loss: Any


STEPS = 0


class Recent(deque[float]):
    """The last values, in a container of its own class."""


class Unusual:
    """State in slots, a class, a module, a closure, containers, iterators and generators."""

    __slots__ = ("called", "draws", "numbered", "numbers", "recent", "waiting")
    total = 0.0

    def __init__(self) -> None:
        calls = 0

        def called() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.called, self.recent = called, Recent(maxlen=3)
        self.draws, self.numbered = [random.Random(3)], itertools.count(1)
        self.numbers, self.waiting = array("d", [0.0]), queue.Queue[int]()

    def step(self, value: float) -> float:
        """Change all of it; the result depends on all of it."""
        global STEPS  # noqa: PLW0603
        STEPS += 1
        Unusual.total += value
        self.recent.append(value)
        self.numbers[0] += value
        self.waiting.put(self.called())
        queued: int = sum(self.waiting.queue) + next(self.numbered) + STEPS
        return sum(self.recent) + self.numbers[0] + Unusual.total + queued + self.draws[0].random()


def peculiar(distribution: Any) -> Any:
    """Return a callback with state where scripts like to keep it.

    It makes the ranks differ in a bias, makes an average of a layer with the first batch, keeps a teacher in a list and
    named tuples in another, records in a closure, and keeps a quarter of each gradient for the next step.
    """

    class Peculiar(distribution.callbacks.Callback):
        def __init__(self) -> None:
            self.average: Any = None
            self.losses: list[Losses] = []
            self.unusual = Unusual()
            self.norms = norms = list[float]()
            self.record = lambda layer, _, output: norms.append(float(output.detach().norm()))

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.head.register_forward_hook(self.record)
            self.teachers = [copy.deepcopy(pl_module.head)]
            pl_module.optimizer_zero_grad = partial(keep_a_quarter, pl_module)

        @torch.no_grad()
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.head.bias.add_(0.001 * trainer.global_rank)

        @torch.no_grad()
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            if self.average is None:
                self.average = copy.deepcopy(pl_module.head)
            for followed in (self.average, *self.teachers):
                for slow, quick in zip(followed.parameters(), pl_module.head.parameters(), strict=True):
                    slow.lerp_(quick, 0.1)
            self.losses.append(Losses(trainer.global_step, outputs["loss"].detach()))
            pl_module.log("average", self.average.weight.sum())
            pl_module.log("teacher", self.teachers[0].bias.sum())
            pl_module.log("norms", sum(self.norms))
            pl_module.log("unusual", self.unusual.step(float(outputs["loss"])))
            pl_module.log("all_losses", sum(float(each.loss) for each in self.losses))

    return Peculiar()


def dying(distribution: Any) -> Any:
    """Return a callback whose start hook calls a collective.

    If faults are injected, rank 0 is killed in this hook once, in the second process that calls it.
    """

    class Dying(distribution.callbacks.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero and os.environ.get(environment.FAULTS):
                calls = Path("calls_of_the_start_hook")
                with calls.open("a") as file:
                    file.write("called\n")
                if len(calls.read_text().splitlines()) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            trainer.strategy.barrier()

    return Dying()


def dragging(distribution: Any) -> Any:
    """Return a callback that makes rank 1 slow in the first process that has it, if faults are injected.

    A file `swift` says that another process has the rank.
    """

    class Dragging(distribution.callbacks.Callback):
        def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
            if trainer.global_rank == 1 and os.environ.get(environment.FAULTS):
                first = Path("first_of_rank_1")
                if not first.exists():
                    first.write_text(str(os.getpid()))
                if first.read_text() == str(os.getpid()):
                    threading.Event().wait(0.3)
                else:
                    Path("swift").touch()

    return Dragging()


def decaying(distribution: Any) -> Any:
    """Return a callback that makes all weights smaller at the start of a batch, in a way that torch does not count."""

    class Decaying(distribution.callbacks.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.data.mul_(0.99)

    return Decaying()


def keep_a_quarter(module: nn.Module, *_: Any) -> None:
    """Scale the gradients instead of dropping them."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25)


def kill_once(rank: int, *_: Any) -> None:
    """Kill rank 1 of a run with injected faults, once."""
    marker = Path("killed_in_a_search")
    if os.environ.get(environment.FAULTS) and rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
