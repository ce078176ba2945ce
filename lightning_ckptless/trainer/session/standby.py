"""A standby: a process that has run the script up to `fit` and waits there for a rank."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import torch

from lightning_ckptless import environment
from lightning_ckptless.configuration.variables import with_variables
from lightning_ckptless.internals.lightning.metrics import metrics_of
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.protocol.messages import AssignRank, StandbyReady
from lightning_ckptless.trainer.session.arenas import find_arena
from lightning_ckptless.trainer.session.identity import fits_before, identify
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng


def wait_for_rank(channel: AgentChannel, strategy: Any, trainer: Any, model: torch.nn.Module | None = None) -> None:
    """Wait until the agent assigns a rank to this process, and adopt it. Exits if the agent has exited.

    Args:
        channel: channel to the agent.
        strategy: strategy of the trainer, set up for a placeholder rank.
        trainer: the trainer, in the call that the process waits in; None if that is none of a trainer's.
        model: the model of that call; None if there is none.
    """
    warm_up(strategy.root_device)
    if model is not None:
        # The first question whether an object is a metric takes a moment for each class.
        metrics_of(model.named_modules())
    if trainer is not None:
        arena = find_arena(identify(trainer), fits_before(), with_variables(strategy.options))
        if arena is not None:
            arena.read_layouts()
    # Not in the middle of a recovery.
    gc.collect()
    channel.send(StandbyReady())
    received = channel.receive()
    if received is None:
        sys.exit(0)
    message, files = received
    assert isinstance(message, AssignRank), f"a standby received {message}"
    os.environ[environment.HIDDEN_STREAMS] = ",".join(map(str, files))
    del os.environ[environment.STANDBY]
    os.environ.update(message.env)
    strategy.set_world_ranks()


def warm_up(device: torch.device) -> None:
    """Run a small network once: forward, backward and an optimizer step. Restores the random number generators.

    The first run of each takes a new process some tenths of a second, on an accelerator some seconds: to create a
    context, load kernels and start threads. The first seeding and the first search for metrics take some milliseconds.
    Done here, they delay no recovery.

    Args:
        device: device that the process will train on.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    generators = capture_rng()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 8)
    ).to(device)
    metrics_of(network.named_modules())
    optimizer = torch.optim.AdamW(network.parameters())
    classes = torch.zeros(16, dtype=torch.long, device=device)
    loss = torch.nn.functional.cross_entropy(network(torch.zeros(16, 64, device=device)), classes)
    torch.autograd.backward(loss)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    apply_rng(generators)
