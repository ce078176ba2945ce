"""What a check of `ckptless doctor` says, and the job that it is said for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SLOTS = 2
"""Of each replica: one holds the committed version while the next one is written."""
FLOAT_BYTES = 4


class Status(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Args:
        name: what was looked at.
        status: `failure` where training will not work, `warning` where it will work less well than it could.
        found: what is there.
        expected: what has to be there.
        fix: what to do, in a sentence; empty where nothing has to be done.
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
        weight_bytes: of all parameters and buffers.
        optimizer_bytes: of the optimizer, after its first step.
    """

    weight_bytes: int
    optimizer_bytes: int

    @classmethod
    def of_parameters(cls, count: int, optimizer_states: int) -> State:
        """The state of so many parameters in float32.

        Args:
            count: of parameters, all of them trained.
            optimizer_states: tensors of a parameter's size that the optimizer keeps for it, e.g. 2 for Adam.
        """
        return cls(count * FLOAT_BYTES, count * FLOAT_BYTES * optimizer_states)

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return self.weight_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained here, as far as the checks need to know it.

    Args:
        ranks: on this machine.
        nodes: machines, each with as many ranks.
        copies: replicas of each shard beyond the writer's own.
        failure_domain: what is lost together.
        state: None where the size of the model is not known.
        has_gpu: whether the ranks train on GPUs.
        is_sharded: whether each rank trains a part of the model, and not all of it.
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
        """Ranks on all machines."""
        return self.ranks * self.nodes

    @property
    def domains(self) -> list[str]:
        """The failure domain of each rank."""
        return [f"{rank if self.failure_domain == 'rank' else rank // self.ranks}" for rank in range(self.world_size)]

    @property
    def kept_copies(self) -> int:
        """Copies that there is a place for: none where everything is lost together."""
        return self.copies if len(set(self.domains)) > 1 else 0

    def replicated(self, whole_bytes: int) -> int:
        """Bytes on this machine for a state that is divided over all ranks, in all slots of all replicas."""
        return -(-SLOTS * (1 + self.kept_copies) * whole_bytes // self.nodes)
