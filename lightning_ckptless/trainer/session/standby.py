"""A standby: a process that has come to `fit` and waits there for a rank."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.protocol.messages import AssignRank, StandbyReady
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng


def wait_for_rank(line: AgentChannel, strategy: Any) -> None:
    """Wait until the agent gives this process a rank, and become it. Ends the process where the agent is gone.

    Args:
        line: to the agent.
        strategy: of the trainer; it was made for a rank that stands in for the one to come.
    """
    warm_up(strategy.root_device)
    line.send(StandbyReady())
    received = line.receive()
    if received is None:
        sys.exit(0)
    message, files = received
    assert isinstance(message, AssignRank), f"a standby received {message}"
    os.environ[environment.HIDDEN_STREAMS] = ",".join(map(str, files))
    del os.environ[environment.STANDBY]
    os.environ.update(message.env)
    strategy.set_world_ranks()


def warm_up(device: torch.device) -> None:
    """Run a small network once, forward, backward and in an optimizer, with generators put back afterwards.

    The first time of each costs a new process some tenths of a second, and on a device some seconds, for a context,
    kernels that are loaded and threads that are started: here it costs nobody anything.

    Args:
        device: that the process will train on.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    generators = capture_rng()
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 8)
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    classes = torch.zeros(16, dtype=torch.long, device=device)
    loss = torch.nn.functional.cross_entropy(network(torch.zeros(16, 64, device=device)), classes)
    torch.autograd.backward(loss)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    apply_rng(generators)
