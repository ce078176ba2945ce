"""One node of the simulated run: the real agent with simulated processes, stores and clock.

Simulated are what the agent starts (`Machine`), what it reads (`NoReports`), where it meets others (`RoundStore`), and
torch elastic's loop around it (`SimulatedNode`, which does what `CkptlessAgent` and its base class do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

from torch.distributed import HashStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lightning_ckptless import environment
from lightning_ckptless.console import Console
from lightning_ckptless.membership.agent.agent import AgentParts, Found, NodeAgent
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
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import EventSink, Report
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.sidecar import SidecarLauncher, Sidecars
from lightning_ckptless.membership.rendezvous.generation import skip_generations
from lightning_ckptless.membership.rendezvous.handlers import one_machine
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.membership.requests import Requests
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.hang_detection import RankProgress, RegroupStatus
from lightning_ckptless.protocol.messages import Message
from lightning_ckptless.protocol.node_liveness import AllAlive, Finding, Partitioned
from tests.simulation.arena import NOWHERE
from tests.simulation.processes import PORT


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


class NoHangs(HangWatch):
    """The watch over workers that leave nothing in files: none of them hangs."""

    def progress(self, workers: WorkerGroup) -> dict[int, RankProgress]:
        """No progress is written."""
        return {}

    def poll_regroup(self, status: RegroupStatus, workers: WorkerGroup) -> None:
        """No rank is late."""


class NoLateExits(LateExits):
    """The watch over workers whose scripts do not fail."""

    def poll(self, workers: WorkerGroup) -> None:
        """No failure is written."""


class SimulatedStarter(Starter):
    """Starts the workers of a node as simulated processes.

    Args:
        machine: starts them.
        run: the run on this node.
        clock: of the node.
    """

    def __init__(self, machine: Machine, run: NodeRun, clock: Clock) -> None:
        self._machine = machine
        self._run = run
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
        env = {
            **rendezvous.variables[local_rank],
            environment.AGENT_STARTED_AT: "0.0",
            environment.SPAWNED_AT: repr(self._clock.wall()),
        }
        if self._run.faults:
            env[environment.FAULT_REPORT] = self._run.faults[-1].to_json()
        return env

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
    def of_workers(self) -> Store:
        """The same store for the workers."""
        return self._store

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
        if self.node == 0:
            skip_generations(self.store, self.master[1] - 1)
        return self.store


class SimulatedHeartbeat:
    """What the heartbeats of a node find out; see `node_liveness.Heartbeat`."""

    def __init__(self) -> None:
        self.finding: Finding = AllAlive()

    def begin_round(self, store: object, **_: object) -> None:
        """No store is on a network."""

    def rest(self) -> None:
        """Forget which nodes are lost: a new round has begun. A node that was found partitioned stays so."""
        if not isinstance(self.finding, Partitioned):
            self.finding = AllAlive()

    def leave(self) -> None:
        """No node misses this one."""

    close = leave


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
        size: number of its workers.
        start: makes a process, given its environment.
        now: returns the simulated time in seconds.
        record: receives the agent's events.
        log: receives its messages.

    Attributes:
        agent: the agent.
        heartbeat: tells the agent which nodes are silent.
        round: number of the last round that it has completed a rendezvous for; 0 before the first.
        place: of the node in the order in which the nodes of that round have met.
        rank: of the node in the round that it has begun last; -1 before the first.
        node_ranks: ranks of the nodes of that round, by their places.
        meets: whether the node waits in a rendezvous, during which its agent does nothing else.
        is_over: whether its workers have ended, for good.
        has_trained: whether they have taken part in the run until its end.
    """

    def __init__(
        self,
        number: int,
        size: int,
        start: Callable[[Mapping[str, str]], SimulatedProcess],
        now: Callable[[], float],
        record: Callable[..., None],
        log: Callable[[str], None],
    ) -> None:
        self.number = number
        self.size = size
        self.round = self.place = 0
        self.rank = -1
        self.node_ranks: tuple[int, ...] = ()
        self.meets = False
        self.is_over = False
        self.has_trained = True
        self.heartbeat = SimulatedHeartbeat()
        self.reports = NoReports()
        self._trains = False
        self._world_before = 0
        clock, run = Clock(now, now), NodeRun()
        settings = NodeSettings(
            f"node{number}", Program("script", "train.py", ()), {}, "", False, 1.0, 1.0, 1e9, NOWHERE, 1
        )
        events = EventSink(record, _Log(lambda text: log(f"node {number}: {text}")))
        parts = _parts(settings, run, self.reports, self.heartbeat, Machine(start), events.report, clock)
        self.agent = NodeAgent(settings, run, parts, events, clock)

    def poll(self, others_wait: Callable[[bool], bool], meet: Callable[[], None]) -> None:
        """Let the agent react, and do what torch elastic does next.

        Args:
            others_wait: whether other nodes wait in a rendezvous, given whether those that join the run count.
            meet: called when this node begins to.
        """
        if self.meets or self.is_over or not self.agent.has_started:
            return
        try:
            found = self.agent.poll()
        except RendezvousConnectionError as error:
            self.end(error)
            return
        if found is Found.OVER:
            self.is_over = True
            return
        if found is Found.NODES_CHANGED:
            self._begin_rendezvous(meet)
            return
        if found is not Found.REPLACED:
            if self.agent.workers.failed():
                self._begin_rendezvous(meet)
                return
            if not self.agent.workers.running:
                self.is_over = self.agent.may_finish()
        found = self.agent.poll_nodes()
        if found is Found.NODES_CHANGED or (not self.is_over and others_wait(self.agent.admits_nodes)):
            self._begin_rendezvous(meet)
        elif found is Found.NOT_NEEDED:
            self.is_over, self.has_trained = True, False

    def end(self, error: Exception) -> None:
        """End the agent and its workers."""
        self.is_over, self.has_trained = True, False
        self.agent.end(self.agent.begin_end(error))

    def _begin_rendezvous(self, meet: Callable[[], None]) -> None:
        self._trains = self.agent.keeps_training()
        if not self._trains:
            self.agent.stop_workers()
        self.meets = True
        meet()

    def publish_status(self, store: RoundStore, number: int, place: int) -> None:
        """Publish the status of this node, once all nodes wait in the rendezvous.

        Args:
            store: of the round.
            number: of the round.
            place: of this node in the order in which the nodes have met.
        """
        self.round, self.place = number, place
        self.agent.publish_status(store, place)

    def begin_round(self, store: RoundStore, number: int, place: int, sizes: Sequence[int]) -> None:
        """Begin a round of the rendezvous.

        Args:
            store: of the round.
            number: of the round.
            place: of this node in the order in which the nodes have met.
            sizes: number of workers of each node, in that order.
        """
        plan = self.agent.agree(store, place, len(sizes))
        self.node_ranks, self.rank, world_size = plan.node_ranks, plan.node_ranks[place], sum(sizes)
        first = sum(size for rank, size in zip(plan.node_ranks, sizes, strict=True) if rank < self.rank)
        ranks = {local: first + local for local in range(self.size)}
        variables = {
            local: {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world_size), PORT: str(number)}
            for local, rank in ranks.items()
        }
        rendezvous = SimulatedRound(
            node=self.rank,
            nodes=len(sizes),
            world_size=world_size,
            ranks=ranks,
            store=store,
            master=("", number),
            variables=variables,
            role="default",
            run_id="run",
            uses_agent_store=True,
        )
        self.agent.begin_round(rendezvous, plan)
        self.meets = False
        world_before, self._world_before = self._world_before, world_size
        if self._trains and self.agent.keep_workers(world_before):
            return
        if self._trains:
            self.agent.stop_workers()
        self.agent.start_workers(lambda _: None)


def _parts(
    settings: NodeSettings,
    run: NodeRun,
    reports: NoReports,
    heartbeat: SimulatedHeartbeat,
    machine: Machine,
    report: Report,
    clock: Clock,
) -> AgentParts:
    in_place = InPlaceRecovery(
        in_place=None,
        standbys=None,
        preload_imports=False,
        folder=NOWHERE,
        outputs=NOWHERE,
        report=report,
        clock=clock,
    )
    faults = FaultLog(settings.name, run.faults, report, lambda: "", clock)
    membership = one_machine("run", 1, 3)
    stragglers = StragglerWatch(NOWHERE, report, clock)
    draining = Draining(settings.name, settings.least_nodes, 1, membership, stragglers, in_place, report, clock)
    rewinds = RewindRequests()
    launcher = SidecarLauncher(_no_fork_server, {}, "", (), False)
    return AgentParts(
        folder=NOWHERE,
        starter=SimulatedStarter(machine, run, clock),
        in_place=in_place,
        draining=draining,
        faults=faults,
        recovery=Recovery(settings, run, in_place, draining, faults, reports, lambda: "", report, clock),
        guard=PartitionGuard(settings.name, heartbeat, membership, faults, report, clock),
        hangs=NoHangs(NOWHERE, report, clock),
        late_exits=NoLateExits(NOWHERE, settings.exit_grace_s, clock),
        memory=HeldMemory(settings.name, report),
        sidecars=Sidecars(launcher, report),
        rewinds=rewinds,
        requests=RunRequests(Requests(NOWHERE), draining, rewinds, clock),
        notices=Notices(SigtermNotice(), "", None, report, clock),
    )


def _no_fork_server() -> Any:
    raise NotImplementedError
