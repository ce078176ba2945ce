"""The events of draining: see `events.py` for what an event is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_ckptless.membership.events import Event


@dataclass(frozen=True, slots=True)
class _WithCause(Event):
    """An event with a cause.

    Args:
        node: name of the node.
        cause: why the node or a rank of it is drained.
        reason: the consequence, in a sentence.
    """

    node: str
    cause: str
    reason: str

    @property
    def sentence(self) -> str:
        """The consequence and its cause."""
        return f"{self.reason} ({self.cause})"


@dataclass(frozen=True, slots=True)
class DrainPlanned(_WithCause):
    """It was decided whether to drain a rank or a node.

    Args:
        node: see the base class.
        cause: see there.
        reason: see there.
        action: a `draining.DrainAction`.
        drained_rank: the rank; None for the whole node.
    """

    name: ClassVar[str] = "drain"
    action: str
    drained_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """A rank was handed over at a committed step.

    Args:
        node: name of the node.
        drained_rank: the rank.
        step: step at which all ranks have stopped.
        cause: why it was drained.
        pid: process that had the rank.
        exit_code: its exit code; None if it took too long to exit.
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
        """What was done, as an answer to the request."""
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
    """The function that gives notice of a preemption fails or does not return."""

    name: ClassVar[str] = "notice_failed"
    function: str
    reason: str

    @property
    def sentence(self) -> str:
        """What has failed."""
        return f"preemption notice: {self.function} fails: {self.reason}; training continues, and it is called again"


@dataclass(frozen=True, slots=True)
class NodeDrained(_WithCause):
    """The workers of a drained node have exited.

    Args:
        node: see the base class.
        cause: see there.
        reason: how its work was moved, in a sentence.
        step: step at which all ranks have stopped; None if the workers were not handed over.
        exit_codes: exit codes of its workers, by local rank; None for one that has yet to exit.
    """

    name: ClassVar[str] = "node_drained"
    step: int | None
    exit_codes: Mapping[int, int | None]
