"""What a run of the soak test trains, and its faults: plain data, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.fault_script import Fault, FaultKind
from tests.lab.parts import Options

BATCH = 4
"""Samples per micro-batch of the test script."""
EPOCHS = 2
STEPS_PER_EPOCH = 24
STEPS = EPOCHS * STEPS_PER_EPOCH
SILENT = frozenset({FaultKind.HANG, FaultKind.STOP})
"""Injected faults that end no process: they are detected when the others have waited long enough."""


class OutsideKind(StrEnum):
    """A fault that another process causes, at any moment."""

    KILL = "kill"
    STOP = "stop"
    CRASH = "crash"
    FLIP = "flip"
    MEMORY = "memory"
    STANDBY = "standby"
    FORK_SERVER = "fork_server"
    SIDECAR = "sidecar"
    DISK_FULL = "disk_full"
    CUT = "cut"


class Loss(StrEnum):
    """What is lost of a node."""

    AGENT = "agent"
    AGENT_AND_ARENA = "agent_and_arena"
    NODE = "node"
    STORE_HOST = "store_host"
    LINK = "link"


class Phase(StrEnum):
    """A phase of a recovery, named by the ledger event with which it begins."""

    FIRED = "fault_injected"
    DETECTED = "fault"
    REGROUPING = "in_place"
    RESTORED = "restored"
    RECOVERED = "recovery"


@dataclass(frozen=True)
class OutsideFault:
    """A fault from outside.

    Args:
        kind: kind of fault.
        rank: target rank; for a cut link, the node at its end.
        step: optimizer step after whose commit it occurs; with a phase, the step of the injected fault that it follows.
        phase: phase of that fault's recovery in which it occurs; None if it follows no other fault.
        delay_s: seconds from there.
    """

    kind: OutsideKind
    rank: int
    step: int
    phase: Phase | None = None
    delay_s: float = 0.0

    def __str__(self) -> str:
        after = "" if self.phase is None else f":after={self.phase}"
        return f"outside-{self.kind}:rank={self.rank}:step={self.step}{after}+{self.delay_s:.3f}s"


@dataclass(frozen=True)
class Configuration:
    """What is trained, and how it is protected.

    Args:
        ranks: number of ranks on all nodes together.
        nodes: number of agents on this machine.
        loss: what is lost of a node in the run; None if all agents stay.
        elastic: whether the others continue without a lost node.
        mesh: data-parallel x tensor-parallel ranks of a sharded model; empty for DDP.
        workers: dataloader workers.
        accumulate: micro-batches per step.
        val_interval: batches between two validations; 0 for one at the end of an epoch.
        standbys: number of standbys.
        durable: whether durable states are written.
        copies: whether each shard has a copy on another rank.
        hang_timeout_s: hang timeout of the strategy; None to learn it.
        slow_mirror_s: seconds by which each round of the mirror is delayed.
    """

    ranks: int = 2
    nodes: int = 1
    loss: Loss | None = None
    elastic: bool = False
    mesh: str = ""
    workers: int = 0
    accumulate: int = 1
    val_interval: int = 0
    standbys: int = 0
    durable: bool = False
    copies: bool = False
    hang_timeout_s: float | None = None
    slow_mirror_s: float = 0.0

    @property
    def strategy_options(self) -> dict[str, object]:
        """Options of the strategy that differ from its defaults."""
        chosen = {
            "standbys": self.standbys or None,
            "durable_every_n_steps": 5 if self.durable else None,
            "failure_domain": "rank" if self.copies else None,
            "hang_timeout_s": self.hang_timeout_s,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def undisturbed(self) -> Options:
        """Options of the test script for the undisturbed run; they do not depend on how the run is protected."""
        data_ranks = int(self.mesh.split("x")[0]) if self.mesh else self.ranks
        return Options(
            devices=self.ranks, epochs=EPOCHS, samples=BATCH * data_ranks * self.accumulate * STEPS_PER_EPOCH,
            workers=self.workers, accumulate=self.accumulate, val_interval=self.val_interval or 1.0, mesh=self.mesh,
        )  # fmt: skip

    def __str__(self) -> str:
        kind = "DDP" if not self.mesh else "FSDP2" if self.mesh.endswith("x1") else f"2-D {self.mesh}"
        parts = {
            f"{kind} on {self.ranks}": True,
            f"{self.nodes} nodes": self.nodes > 1,
            f"loses {self.loss}": self.loss,
            "elastic": self.elastic,
            f"workers={self.workers}": self.workers,
            f"accumulate={self.accumulate}": self.accumulate > 1,
            f"val every {self.val_interval}": self.val_interval,
            "standby": self.standbys,
            "durable": self.durable,
            "copies on ranks": self.copies,
        }
        return ", ".join(part for part, applies in parts.items() if applies)


@dataclass(frozen=True)
class Scenario:
    """One run of the soak test.

    Args:
        seed: seed from which it was drawn.
        configuration: what is trained.
        injected: faults from inside a worker, at an exact moment.
        outside: faults that other processes cause.
        load: whether all cores are kept busy at the same time.
    """

    seed: int
    configuration: Configuration
    injected: tuple[Fault, ...]
    outside: tuple[OutsideFault, ...]
    load: bool

    @property
    def faults(self) -> tuple[str, ...]:
        """All faults, in words."""
        return (*map(self.named, self.injected), *map(str, self.outside))

    def named(self, fault: Fault) -> str:
        """Return an injected fault in words; the loss of a node is named by what is lost."""
        loss = self.configuration.loss
        return str(fault) if loss is None or fault.kind is not FaultKind.NODE else str(fault).replace("node", loss, 1)

    def __str__(self) -> str:
        load = ", both cores loaded" if self.load else ""
        return f"seed {self.seed}: {self.configuration}, {len(self.faults)} faults{load}"
