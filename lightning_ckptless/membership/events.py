"""The events of an agent: what each one records in the run's ledger, and the sentence that it shows to the user.

An event with a `name` is recorded, and one with a `sentence` is shown. The parts of an agent report all of them to
one sink and know neither the ledger nor the console.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from lightning_ckptless.console import CONSOLE, Bar, Console
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.protocol.messages import StuckCollective


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; its dataclass fields are what is recorded, unless a subclass says otherwise."""

    name: ClassVar[str] = ""
    """Name in the ledger; empty if the event is not recorded."""

    def details(self) -> dict[str, Any]:
        """What is recorded with the name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def sentence(self) -> str:
        """What is shown to the user; empty if nothing is."""
        return ""


Report = Callable[[Event], None]
"""Receives the events of one part of the agent."""


class EventSink:
    """Where the events of one agent go.

    Args:
        record: records an event, as `record(name, **details)`.
        console: shows its sentence.
    """

    def __init__(self, record: Callable[..., None], console: Console = CONSOLE) -> None:
        self._record = record
        self._console = console

    def report(self, event: Event) -> None:
        """Record an event and show it to the user."""
        if event.name:
            self._record(event.name, **event.details())
        if sentence := event.sentence:
            self._console.say(sentence)

    def expect_bar(self, bar: str) -> None:
        """Record which progress bar the workers draw on the terminal from now on."""
        self._console.bar = Bar(bar)


@dataclass(frozen=True, slots=True)
class Announcement(Event):
    """A message for the user alone, whose text comes from elsewhere: an error, or the reason of a decision.

    Args:
        text: the message.
    """

    text: str

    @property
    def sentence(self) -> str:
        """The text."""
        return self.text


# ---------------------------------------------------------------- the agent itself


@dataclass(frozen=True, slots=True)
class AgentStarted(Event):
    """The agent of a node has started: the run starts or restarts there."""

    name: ClassVar[str] = "agent_started"
    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class AgentEnded(Event):
    """All workers of a node have exited, and its agent is about to exit."""

    name: ClassVar[str] = "agent_ended"
    node: str
    exit_code: int


# ---------------------------------------------------------------- starting workers


@dataclass(frozen=True, slots=True)
class WorkersSpawned(Event):
    """All workers of a node have been started.

    Args:
        node: name of the node.
        world_size: number of ranks of all nodes.
        pids: process ids by rank.
        host: name of the host.
        agent: process id of the agent.
        folder: the agent's folder, in which the workers write their progress.
    """

    name: ClassVar[str] = "workers_spawned"
    node: str
    world_size: int
    pids: Mapping[int, int]
    host: str
    agent: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Relaunched(Event):
    """All workers of a node have been restarted.

    Args:
        node: name of the node.
        fault: why they were stopped.
        reason: why the recovery was not in place.
        world_size: number of ranks that were started.
        count: which recovery of the run this is, in words.
    """

    name: ClassVar[str] = "relaunch"
    node: str
    fault: FaultReport
    reason: str
    world_size: int
    count: str

    def details(self) -> dict[str, Any]:
        """The fault as its number and cause."""
        return {
            "node": self.node,
            "restart": self.fault.restart,
            "world_size": self.world_size,
            "cause": str(self.fault),
            "reason": self.reason,
        }

    @property
    def sentence(self) -> str:
        """The fault and its consequence."""
        return f"{self.fault}; all {self.world_size} workers relaunched, {self.count} ({self.reason})"


@dataclass(frozen=True, slots=True)
class ForksRefused(Event):
    """The system allows no further process for the moment."""

    error: Exception
    pause_s: float

    @property
    def sentence(self) -> str:
        """The error, and what follows from it."""
        return f"{self.error}; starting all workers again in {self.pause_s:g} s"


@dataclass(frozen=True, slots=True)
class ForkServerReplaced(Event):
    """The fork server has exited while workers were forked."""

    error: Exception

    @property
    def sentence(self) -> str:
        """The error, and what follows from it."""
        return f"{self.error}; starting a new fork server and all workers"


@dataclass(frozen=True, slots=True)
class ForkServerGivenUp(Event):
    """Workers are started as new interpreters."""

    reason: str

    @property
    def sentence(self) -> str:
        """What follows from it, and the reason."""
        return f"workers are started as new interpreters from now on, so a relaunch takes longer: {self.reason}"


@dataclass(frozen=True, slots=True)
class ImportsLearned(Event):
    """New processes are forked with the script's imports in them."""

    name: ClassVar[str] = "imports_learned"
    modules: int
    left_out: Mapping[str, str]
    tries: int
    took_s: float
    pid: int | None


@dataclass(frozen=True, slots=True)
class ImportsNotLearned(Event):
    """New processes must import the script's modules themselves."""

    name: ClassVar[str] = "imports_not_learned"
    reason: str
    tries: int

    @property
    def sentence(self) -> str:
        """What follows from it, and the reason."""
        return f"new processes import the script's modules themselves, nothing is preloaded for them: {self.reason}"


# ---------------------------------------------------------------- faults and recoveries


@dataclass(frozen=True, slots=True)
class Fault(Event):
    """Workers are lost, or were stopped because nodes joined or left."""

    name: ClassVar[str] = "fault"
    node: str
    report: FaultReport

    def details(self) -> dict[str, Any]:
        """The report, field by field."""
        return {"node": self.node, **self.report.fields()}


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """No recovery follows a fault."""

    fault: FaultReport
    reason: str

    @property
    def sentence(self) -> str:
        """The fault, and why no recovery follows."""
        return f"{self.fault}; {self.reason}"


@dataclass(frozen=True, slots=True)
class RecoveredInPlace(Event):
    """The lost ranks of a node are replaced, and the survivors are notified.

    Args:
        node: name of the node.
        regrouping: number of the regrouping that all ranks join.
        reason: why the recovery is in place.
        fault: fault that lost them.
        new: process id and kind of each replacement, by rank.
    """

    name: ClassVar[str] = "in_place"
    node: str
    regrouping: int
    reason: str
    fault: FaultReport
    new: Mapping[int, tuple[int, str]]

    def details(self) -> dict[str, Any]:
        """The fault as its cause."""
        return {
            "node": self.node,
            "regrouping": self.regrouping,
            "reason": self.reason,
            "cause": str(self.fault),
            "new": self.new,
        }

    @property
    def sentence(self) -> str:
        """The fault, its consequence, and what replaces the lost ranks."""
        kinds = {kind for _, kind in self.new.values()}
        if len(kinds) > 1:
            kinds = {", ".join(f"rank {rank}: {kind}" for rank, (_, kind) in self.new.items())}
        return f"{self.fault}; {self.reason} ({kinds.pop()})"


@dataclass(frozen=True, slots=True)
class StandbysChanged(Event):
    """A standby has become ready, has exited or was started."""

    name: ClassVar[str] = "standbys"
    ready: int
    wanted: int
    pids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StandbysExited(Event):
    """Standbys have repeatedly exited before they were ready."""

    count: int
    output: str

    @property
    def sentence(self) -> str:
        """The consequence, and the output of the last one."""
        return (
            f"{self.count} standbys exited before they were ready; continuing without standbys. "
            f"Output of the last one:\n{self.output}"
        )


@dataclass(frozen=True, slots=True)
class StandbysRefused(Event):
    """The system allows no standby."""

    error: Exception

    @property
    def sentence(self) -> str:
        """What follows from it, and the reason."""
        return f"continuing without standbys: {self.error}"


@dataclass(frozen=True, slots=True)
class ReplacementFailed(Event):
    """A new process has exited before it joined the other ranks.

    Args:
        path: file with its output.
        lines: the last ones of it.
        count: how many new processes have left the same output, this one included.
    """

    path: Path
    lines: Sequence[str]
    count: int

    @property
    def sentence(self) -> str:
        """The output, the first time."""
        what = f"a new process failed before it joined the other ranks; its output, in {self.path}"
        if self.count > 1:
            return f"{what}, is the same as above, {self.count} times so far"
        return "\n  ".join([f"{what}:", *self.lines])


# ---------------------------------------------------------------- hangs


@dataclass(frozen=True, slots=True)
class HangFound(Event):
    """Workers are killed because they hang."""

    name: ClassVar[str] = "hang"
    local_ranks: Sequence[int]
    reason: str
    stacks: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class StuckCollectiveReported(Event):
    """A worker has reported that it cannot release its process groups.

    Args:
        local_rank: local rank of the worker.
        believed: whether the report leads to its replacement.
        message: the report.
    """

    name: ClassVar[str] = "stuck_collective"
    local_rank: int
    believed: bool
    message: StuckCollective

    def details(self) -> dict[str, Any]:
        """The report, field by field."""
        return {"local_rank": self.local_rank, "believed": self.believed, **asdict(self.message)}


@dataclass(frozen=True, slots=True)
class StepTimes(Event):
    """How long the workers of a node compute per step, without waiting, in milliseconds by local rank."""

    name: ClassVar[str] = "step_times"
    own_ms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class StragglerFound(Event):
    """A worker takes much longer per step than the others of its node.

    Args:
        slow_rank: its rank.
        own_ms: its own time per step, in milliseconds.
        ratio: that time as a multiple of the others' median.
        reason: how slow it is, and what follows.
    """

    name: ClassVar[str] = "straggler"
    slow_rank: int
    own_ms: float
    ratio: float
    reason: str

    @property
    def sentence(self) -> str:
        """How slow it is, and what follows."""
        return f"straggler: {self.reason}"


# ---------------------------------------------------------------- nodes


@dataclass(frozen=True, slots=True)
class NodesMoved(Event):
    """The nodes have completed another rendezvous, and the workers of some of them stay in the training loop."""

    name: ClassVar[str] = "move"
    node: str
    stay: Sequence[int]
    come: Sequence[int]
    reason: str


@dataclass(frozen=True, slots=True)
class WorldChanged(Event):
    """The workers of a node continue at another world size."""

    reason: str
    world_size: int

    @property
    def sentence(self) -> str:
        """Which nodes stay and join, and the resulting number of ranks."""
        return f"{self.reason}; the world size is {self.world_size}"


@dataclass(frozen=True, slots=True)
class JoinedTooLate(Event):
    """The workers of a node have reached the training loop after those of the other nodes had left it."""

    name: ClassVar[str] = "joined_too_late"
    node: str
    pids: Sequence[int]

    @property
    def sentence(self) -> str:
        """What happens to them."""
        return (
            f"the other nodes left the training loop before this node's workers ({len(self.pids)}) reached it; "
            "stopping them: they have trained no step"
        )


@dataclass(frozen=True, slots=True)
class NodeLost(Event):
    """Other nodes are silent."""

    name: ClassVar[str] = "node_lost"
    node: str
    lost: Sequence[int]
    reason: str

    @property
    def sentence(self) -> str:
        """The reason and its consequence."""
        return f"{self.reason}; remaining nodes are re-rendezvousing"


@dataclass(frozen=True, slots=True)
class NodePartitioned(Event):
    """This node is partitioned from the others."""

    name: ClassVar[str] = "node_partitioned"
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class RendezvousLost(Event):
    """The node that hosts the rendezvous is lost.

    Args:
        cause: how the loss was noticed.
        next: endpoint that the nodes use next.
        reason: why that one.
    """

    name: ClassVar[str] = "rendezvous_lost"
    cause: str
    next: str
    reason: str

    @property
    def sentence(self) -> str:
        """The next endpoint."""
        return f"the rendezvous is lost; re-rendezvousing at {self.reason}"


@dataclass(frozen=True, slots=True)
class EntryIgnored(Event):
    """Another agent has published something unreadable."""

    key: str
    error: Exception

    @property
    def sentence(self) -> str:
        """The ignored entry and the error."""
        return f"ignoring {self.key} in the agents' store: {self.error}"


# ---------------------------------------------------------------- what an agent holds for its workers


@dataclass(frozen=True, slots=True)
class MemoryHolderChosen(Event):
    """The agent holds the memory of its workers, for a reason given by a worker."""

    name: ClassVar[str] = "memory_held"
    node: str
    pid: int
    reason: str

    @property
    def sentence(self) -> str:
        """The reason."""
        return self.reason


@dataclass(frozen=True, slots=True)
class SidecarLost(Event):
    """A sidecar exited by itself, or could not be started."""

    name: ClassVar[str] = "sidecar_lost"
    module: str
    exit_code: int | None
    again_after_s: float


@dataclass(frozen=True, slots=True)
class WaitingForSidecars(Event):
    """The run is over, but sidecars still have work to do."""

    grace_s: float

    @property
    def sentence(self) -> str:
        """How long they may take."""
        return f"waiting up to {self.grace_s:.0f} s for the last durable state"
