"""The process of a simulated worker, and its end of the channel to the agent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_ckptless.membership.channel.agent_channel import AgentChannel, Received
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.protocol.messages import (
    Message,
)
from tests.simulation.network import Group
from tests.simulation.tasks import Task

PORT = "MASTER_PORT"
"""The variable that tells a worker in which round of the rendezvous it meets the others."""


class WorkerChannel(AgentChannel):
    """The worker's end of the channel.

    Args:
        deliver: passes a message on to the agent.
    """

    def __init__(self, deliver: Callable[[Message], None]) -> None:
        self._deliver = deliver
        self._ended = False
        self.inbox: list[Message] = []

    def send(self, message: Message, files: object = ()) -> None:
        """Send a message."""
        self._deliver(message)

    def receive(self) -> Received:
        """Return the next message, which has arrived."""
        return Received(self.inbox.pop(0), [])


@dataclass(eq=False)
class Process:
    """A process, as its node sees it.

    Args:
        name: its number.
        rank: that it was started as.
        local_rank: within its node.
        node: number of its node.
        port: of the round that it was started in.
        joins: whether it joins workers that train.

    Attributes:
        end: how it has exited; None while it runs.
        was_stopped: whether its agent has killed it.
        tasks: its threads.
        group: its connections to other ranks; None without any.
        generation: that it has met in.
        step: optimizer steps of its state.
        finished: whether its `fit` has returned.
    """

    name: int
    rank: int
    local_rank: int
    node: int
    port: str
    joins: bool
    end: End | None = None
    was_stopped: bool = False
    tasks: list[Task] = field(default_factory=list)
    group: Group | None = None
    generation: int = 0
    step: int = 0
    finished: bool = False

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.end is None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name})"
