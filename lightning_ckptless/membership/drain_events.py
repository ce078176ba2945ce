"""The events of draining: see `events.py` for what an event is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_ckptless.membership.events import Event


@dataclass(frozen=True, slots=True)
class DrainAsked(Event):
    """A rank is to be drained.

    Args:
        node: name of the node.
        drained_rank: the rank.
        action: what follows, as `draining.DrainAction` names it.
        cause: why it is to be drained.
        reason: what follows, in a sentence.
    """

    name: ClassVar[str] = "drain"
    node: str
    drained_rank: int
    action: str
    cause: str
    reason: str

    @property
    def sentence(self) -> str:
        """What follows, and why."""
        return f"{self.reason} ({self.cause})"


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """A rank was handed over at a committed step.

    Args:
        node: name of the node.
        drained_rank: the rank.
        step: at which all ranks have stopped.
        cause: why it was drained.
        pid: process that had the rank.
        exit_code: its exit code; None where it took longer to exit than its successor could wait.
        new_pid: process that has the rank now.
        kind: `standby` or `new process`.
    """

    name: ClassVar[str] = "drained"
    node: str
    drained_rank: int
    step: int
    cause: str
    pid: int
    exit_code: int | None
    new_pid: int
    kind: str

    @property
    def summary(self) -> str:
        """What was done, for whoever has requested it."""
        left = "has yet to exit" if self.exit_code is None else f"exited with code {self.exit_code}"
        return (
            f"rank {self.drained_rank} was handed over after step {self.step}: pid {self.pid} {left}, and pid "
            f"{self.new_pid} ({self.kind}) has taken the rank"
        )


@dataclass(frozen=True, slots=True)
class DrainGivenUp(Event):
    """A rank was not handed over, although draining it had begun."""

    name: ClassVar[str] = "drain_given_up"
    node: str
    drained_rank: int
    reason: str

    @property
    def sentence(self) -> str:
        """The reason."""
        return self.reason


@dataclass(frozen=True, slots=True)
class NoticeFailed(Event):
    """The function that gives notice of a preemption fails, or does not return."""

    name: ClassVar[str] = "notice_failed"
    function: str
    reason: str

    @property
    def sentence(self) -> str:
        """What has failed."""
        return f"preemption notice: {self.function} fails: {self.reason}; training continues, and it is called again"


@dataclass(frozen=True, slots=True)
class NodeLeaves(Event):
    """A node is drained: it has left the rendezvous, and its workers train until the others can meet without it.

    Args:
        node: name of the node.
        action: what follows, as `draining.DrainAction` names it.
        cause: why it is drained.
        reason: what follows, in a sentence.
    """

    name: ClassVar[str] = "node_leaves"
    node: str
    action: str
    cause: str
    reason: str

    @property
    def sentence(self) -> str:
        """What follows, and why."""
        return f"{self.reason} ({self.cause})"


@dataclass(frozen=True, slots=True)
class NodeDrained(Event):
    """The workers of a drained node have exited.

    Args:
        node: name of the node.
        step: at which all ranks have stopped; None where the workers were not handed over.
        exit_codes: of its workers, by local rank; None for one that has yet to exit.
        reason: how its work was moved, in a sentence.
        cause: why it was drained.
    """

    name: ClassVar[str] = "node_drained"
    node: str
    step: int | None
    exit_codes: Mapping[int, int | None]
    reason: str
    cause: str

    @property
    def sentence(self) -> str:
        """How its work was moved, and why."""
        return f"{self.reason} ({self.cause})"
