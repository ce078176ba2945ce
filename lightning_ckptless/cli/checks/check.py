"""The result of a check of `ckptless doctor`, and the job that is checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SLOTS = 2
"""Slots per replica: one holds the committed version while the next is written to the other."""
FLOAT_BYTES = 4


class Status(StrEnum):
    """Severity of a check's result."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Args:
        name: subject of the check.
        status: `failure` if training will not work, `warning` if it will work but recover more slowly or less often.
        found: what was found.
        expected: what is required or recommended.
        fix: what to do, in a sentence; empty if the status is `ok`.
    """

    name: str
    status: Status
    found: str
    expected: str
    fix: str = ""


def failed(checks: Iterable[Check]) -> bool:
    """Whether one of the checks is a failure."""
    return any(check.status is Status.FAILURE for check in checks)


@dataclass(frozen=True, slots=True)
class State:
    """The state that a job mirrors.

    Args:
        weight_bytes: size of all parameters and buffers.
        optimizer_bytes: size of the optimizer state after its first step.
    """

    weight_bytes: int
    optimizer_bytes: int

    @classmethod
    def of_parameters(cls, count: int, optimizer_states: int) -> State:
        """Return the state of a model with float32 parameters.

        Args:
            count: number of parameters, all of them trained.
            optimizer_states: optimizer tensors per parameter, e.g. 2 for Adam.
        """
        return cls(count * FLOAT_BYTES, count * FLOAT_BYTES * optimizer_states)

    @property
    def bytes(self) -> int:
        """Total size."""
        return self.weight_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """The facts about a training job that the checks need.

    Args:
        ranks: ranks per node.
        nodes: number of nodes.
        copies: replicas of each shard in addition to the source's own.
        failure_domain: kind of failure domain.
        state: state of the model; None if its size is unknown.
        has_gpu: whether the ranks train on GPUs.
        is_sharded: whether the model is sharded over the ranks.
    """

    ranks: int
    nodes: int = 1
    copies: int = 1
    failure_domain: str = "node"
    state: State | None = None
    has_gpu: bool = False
    is_sharded: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.ranks * self.nodes

    @property
    def domains(self) -> list[str]:
        """The failure domain of each rank."""
        return [f"{rank if self.failure_domain == 'rank' else rank // self.ranks}" for rank in range(self.world_size)]

    @property
    def kept_copies(self) -> int:
        """Copies that can be placed: none with a single failure domain."""
        return self.copies if len(set(self.domains)) > 1 else 0

    def replicated(self, whole_bytes: int) -> int:
        """Return the bytes per node of all slots of all replicas, for a state sharded over all ranks."""
        return -(-SLOTS * (1 + self.kept_copies) * whole_bytes // self.nodes)
