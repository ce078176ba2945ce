"""One node of the simulated run: the real agent with simulated processes, stores and clock.

Simulated are what the agent starts (`Machine`), what it reads (`NoReports`), where it meets others (`RoundStore`), and
torch elastic's loop around it (`SimulatedNode`, which does what `CkptlessAgent` and its base class do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_ckptless import environment
from lightning_ckptless.console import Console
from lightning_ckptless.membership.agent.agent import AgentParts, Found, NodeAgent
from lightning_ckptless.membership.agent.clock import Clock
from lightning_ckptless.membership.agent.draining import Draining
from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.hang_watch import HangWatch, LateExits
from lightning_ckptless.membership.agent.held_memory import HeldMemory
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, joining
from lightning_ckptless.membership.agent.notices import Notices, SigtermNotice
from lightning_ckptless.membership.agent.partition_guard import PartitionGuard
from lightning_ckptless.membership.agent.process_control import ProcessControl, Waited
from lightning_ckptless.membership.agent.recovery import Recovery
from lightning_ckptless.membership.agent.rewind_requests import RewindRequests
from lightning_ckptless.membership.agent.run_requests import RunRequests
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.agent.starting import Starter
from lightning_ckptless.membership.agent.straggler_watch import StragglerWatch
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import AgentChannel, FromWorker, Received
from lightning_ckptless.membership.channel.exit_report import ExitReport
from lightning_ckptless.membership.channel.program_failure import Failure
from lightning_ckptless.membership.channel.worker_reports import WorkerReports
from lightning_ckptless.membership.events import EventSink, Report
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.sidecar import SidecarLauncher, Sidecars
from lightning_ckptless.membership.rendezvous.handlers import one_machine
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.membership.requests import Requests
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.messages import Message
from lightning_ckptless.protocol.node_liveness import Bound

ROUND = "MASTER_PORT"
"""The variable that tells a worker in which round of the rendezvous it meets the others."""
_NOWHERE = Path("/nonexistent")


class SimulatedChannel(AgentChannel):
    """The agent's end of the channel to a simulated process.

    Args:
        deliver: passes a message on to the process.
    """

    def __init__(self, deliver: Callable[[Message], None]) -> None:
        self._deliver = deliver
        self._inbox: list[Message] = []

    def arrive(self, message: Message) -> None:
        """Take a message of the process, which the agent reads when it polls."""
        self._inbox.append(message)

    def send(self, message: Message, files: Sequence[int] = ()) -> None:
        """Send a message to the process."""
        assert not files
        self._deliver(message)

    def poll(self) -> list[Received]:
        """Return the messages of the process since the last call."""
        found, self._inbox = self._inbox, []
        return [Received(message, []) for message in found]

    def close(self) -> None:
        """Nothing is open."""


class SimulatedProcess(Process):
    """A process as its agent sees it.

    Args:
        pid: its process id.
        channel: to it.
        kill: ends it.
        how_ended: returns its exit code and when it has exited; None while it runs.
    """

    def __init__(
        self,
        pid: int,
        channel: SimulatedChannel,
        kill: Callable[[int], None],
        how_ended: Callable[[], End | None],
    ) -> None:
        self.pid = pid
        self.pidfd = pid
        self.channel = channel
        self._kill = kill
        self._how_ended = how_ended

    def is_dying(self) -> bool:
        """Whether it has released its address space: its exit comes at the same moment."""
        return False

    def exit_code(self) -> int | None:
        """Return its exit code before its memory is freed: that takes no time."""
        return None

    def signal(self, number: int, *, alone: bool = False) -> None:
        """Send it a signal, which ends it."""
        assert not alone, "a worker counts as hung, but no simulated worker hangs: its agent waits in vain"
        self._kill(number)

    def has_ended(self) -> bool:
        """Whether it has exited."""
        return self._how_ended() is not None

    def end(self) -> End:
        """Return how it has exited."""
        end = self._how_ended()
        assert end is not None
        return end

    def leave(self, timeout_s: float) -> None:
        """Nothing is open."""


class Machine(ProcessControl):
    """Starts simulated processes; a wait for them takes no time.

    Args:
        start: makes a process, given the environment of its job.
    """

    def __init__(self, start: Callable[[Mapping[str, str]], SimulatedProcess]) -> None:
        self._start = start

    def start(self, job: Job, stdio: Sequence[int]) -> Process:
        """Start a process."""
        return self._start(job.env)

    def wait(self, processes: Mapping[int, Process], timeout_s: float, *, for_messages: bool) -> Waited:
        """Return which processes have exited."""
        return Waited([key for key, process in processes.items() if process.has_ended()], True)


class NoReports(WorkerReports):
    """The reports of workers that leave none: they die, and have no errors of their own."""

    def __init__(self) -> None:
        self.has_begun = False

    def take_begun(self) -> bool:
        """Whether a step has been committed since the last call."""
        begun, self.has_begun = self.has_begun, False
        return begun

    def take_final(self) -> ExitReport | None:
        """No report ends the run."""
        return None

    def failure_of(self, pid: int) -> Failure | None:
        """No script has raised anything."""
        return None

    def step_begun(self, local_rank: int) -> int | None:
        """The step is not known."""
        return None

    def forget_progress(self, local_rank: int) -> None:
        """No progress is kept."""


class SimulatedStarter(Starter):
    """Starts the workers of a node as simulated processes.

    Args:
        machine: starts them.
        clock: of the node.
    """

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock

    def start(
        self, rendezvous: Round, made: Callable[[WorkerContext], None], regrouping: Regrouping | None
    ) -> WorkerGroup:
        """Start all workers of a round."""
        joins = {} if regrouping is None else joining(regrouping)
        program = Program("script", "train.py", ())
        jobs = {rank: Job(program, {**self.env_of(rendezvous, rank), **joins}, "") for rank in rendezvous.ranks}
        nowhere = dict.fromkeys(jobs, "")
        workers = WorkerGroup(self._machine, jobs, stdouts=nowhere, stderrs=nowhere, clock=self._clock)
        made(cast("WorkerContext", SimpleNamespace(workers=workers)))
        workers.start()
        return workers

    def start_standby(self, rendezvous: Round, workers: WorkerGroup, stdio: list[int]) -> Process:
        """No standbys are simulated."""
        raise NotImplementedError

    def env_of(self, rendezvous: Round, local_rank: int) -> dict[str, str]:
        """Return the environment variables that make a process a local rank."""
        return dict(rendezvous.variables[local_rank])

    def receive(self, received: Sequence[FromWorker]) -> None:
        """No message concerns the start of processes."""

    def maintain_successor(self, received: Sequence[FromWorker], workers: WorkerGroup, *, trains: bool) -> None:
        """There is no fork server."""

    def close(self) -> None:
        """Nothing is open."""


class RoundStore:
    """The store of one round, for agents and workers, as far as they use it.

    Args:
        changed: called when an agent has written something.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._store = HashStore()
        self._changed = changed

    @property
    def underlying_store(self) -> RoundStore:
        """The store below the one that the agents of a round share."""
        return self

    def get(self, key: str) -> bytes:
        """Read a value."""
        return bytes(self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys have values."""
        return bool(self._store.check(keys))

    def wait(self, keys: list[str], _: timedelta) -> None:
        """All agents have written before any waits."""
        assert self.check(keys)

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._store.set(key, value)
        self._changed()

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write a value in the place of an expected one."""
        self._changed()
        return bytes(self._store.compare_set(key, expected, desired))

    def add(self, key: str, amount: int) -> int:
        """Add to a number."""
        if amount:
            self._changed()
        return int(self._store.add(key, amount))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several values."""
        return [self.get(key) for key in keys]


@dataclass(frozen=True, slots=True)
class SimulatedRound(Round):
    """A round whose workers meet in the agents' own store."""

    def connect_worker_store(self) -> Any:
        """Return the store that the workers meet in."""
        return self.store


class _Log(Console):
    """Console of a simulated agent.

    Args:
        log: receives its messages.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self._log = log

    def say(self, text: str) -> None:
        """Log a message."""
        self._log(text)


class SimulatedNode:
    """A node: its agent, and torch elastic's loop around it.

    Args:
        number: of the node.
        ranks: of its workers, by local rank.
        start: makes a process, given its environment.
        now: returns the simulated time in seconds.
        record: receives the agent's events.
        log: receives its messages.

    Attributes:
        agent: the agent.
        meets: whether the node waits in a rendezvous, during which its agent does nothing else.
        is_over: whether its workers have ended, for good.
    """

    def __init__(
        self,
        number: int,
        ranks: Mapping[int, int],
        start: Callable[[Mapping[str, str]], SimulatedProcess],
        now: Callable[[], float],
        record: Callable[..., None],
        log: Callable[[str], None],
    ) -> None:
        self.number = number
        self.ranks = ranks
        self.meets = False
        self.is_over = False
        self.reports = NoReports()
        self._trains = False
        self._world_before = 0
        clock, run = Clock(now, now), NodeRun()
        settings = NodeSettings(
            f"node{number}", Program("script", "train.py", ()), {}, "", False, 1.0, 1.0, 1e9, _NOWHERE, 1
        )
        events = EventSink(record, _Log(lambda text: log(f"node {number}: {text}")))
        parts = _parts(settings, run, self.reports, Machine(start), events.report, clock)
        self.agent = NodeAgent(settings, run, parts, events, clock)

    def poll(self, others_wait: Callable[[], bool], meet: Callable[[], None]) -> None:
        """Let the agent react, and do what torch elastic does next.

        Args:
            others_wait: whether other nodes wait in a rendezvous.
            meet: called when this node begins to.
        """
        if self.meets or self.is_over or not self.agent.has_started:
            return
        found = self.agent.poll()
        if found is Found.OVER:
            self.is_over = True
            return
        if found is not Found.REPLACED:
            if self.agent.workers.failed():
                self._begin_rendezvous(meet)
                return
            if not self.agent.workers.running:
                self.is_over = True
        found = self.agent.poll_nodes()
        if found is Found.NODES_CHANGED or (not self.is_over and others_wait()):
            self._begin_rendezvous(meet)
        elif found is Found.NOT_NEEDED:
            self.is_over = True

    def _begin_rendezvous(self, meet: Callable[[], None]) -> None:
        self._trains = self.agent.keeps_training()
        if not self._trains:
            self.agent.stop_workers()
        self.meets = True
        meet()

    def publish_status(self, store: RoundStore) -> None:
        """Publish the status of this node, once all nodes wait in the rendezvous."""
        self.agent.publish_status(store, self.number)

    def begin_round(self, store: RoundStore, number: int, nodes: int, world_size: int) -> None:
        """Begin a round of the rendezvous, with the nodes in the order of their numbers.

        Args:
            store: of the round.
            number: of the round.
            nodes: how many nodes there are.
            world_size: number of ranks.
        """
        plan = self.agent.agree(store, self.number, nodes)
        assert plan.node_ranks == tuple(range(nodes)), "no node has left"
        variables = {local: {"RANK": str(rank), ROUND: str(number)} for local, rank in self.ranks.items()}
        rendezvous = SimulatedRound(
            node=self.number,
            nodes=nodes,
            world_size=world_size,
            ranks=self.ranks,
            store=store,
            master=("", number),
            variables=variables,
            role="default",
            run_id="run",
            uses_agent_store=True,
        )
        self.agent.begin_round(rendezvous, plan)
        self.meets = False
        if self._trains and self.agent.keep_workers(world_size):
            return
        if self._trains:
            self.agent.stop_workers()
        self.agent.start_workers(lambda _: None)


def _parts(
    settings: NodeSettings, run: NodeRun, reports: NoReports, machine: Machine, report: Report, clock: Clock
) -> AgentParts:
    in_place = InPlaceRecovery(
        in_place=None,
        standbys=None,
        preload_imports=False,
        folder=_NOWHERE,
        outputs=_NOWHERE,
        report=report,
        clock=clock,
    )
    faults = FaultLog(settings.name, run.faults, report, lambda: "", clock)
    membership = one_machine("run", 1, 3)
    stragglers = StragglerWatch(_NOWHERE, report, clock)
    draining = Draining(settings.name, settings.least_nodes, 1, membership, stragglers, in_place, report, clock)
    rewinds = RewindRequests()
    launcher = SidecarLauncher(_no_fork_server, {}, "", (), False)
    return AgentParts(
        folder=_NOWHERE,
        starter=SimulatedStarter(machine, clock),
        in_place=in_place,
        draining=draining,
        faults=faults,
        recovery=Recovery(settings, run, in_place, draining, faults, reports, lambda: "", report, clock),
        guard=PartitionGuard(settings.name, Bound(1.0, 3), one_machine("run", 1, 3), faults, report, clock),
        hangs=HangWatch(_NOWHERE, report, clock),
        late_exits=LateExits(_NOWHERE, settings.exit_grace_s, clock),
        memory=HeldMemory(settings.name, report),
        sidecars=Sidecars(launcher, report),
        rewinds=rewinds,
        requests=RunRequests(Requests(_NOWHERE), draining, rewinds, clock),
        notices=Notices(SigtermNotice(), "", None, report, clock),
    )


def _no_fork_server() -> Any:
    raise NotImplementedError


def regrouping_of(env: Mapping[str, str]) -> tuple[int, int]:
    """Return the round and the regrouping that a process is to meet in, by its environment."""
    return int(env[ROUND]), int(env.get(environment.REGROUPING, "0"))
