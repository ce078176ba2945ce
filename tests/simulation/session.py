"""The session of a simulated worker: its process groups, its arena and its member set, over all generations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.distributed_c10d import PrefixStore

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.rendezvous.generation import join_generation
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.transport import gather_json
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.session.identity import Identity
from lightning_ckptless.trainer.session.member_set import MemberSet, form_member_set
from tests.simulation.arena import NOWHERE
from tests.simulation.network import Group, GroupTransport
from tests.simulation.processes import PORT

if TYPE_CHECKING:
    from tests.simulation.worker import Worker

OPTIONS = CkptlessOptions(
    preload_imports=False, max_recoveries_without_progress=1000, max_recoveries_per_hour=1000, checksum="none"
)
_JOIN_S = 600.0


class Nothing:
    """Stands for a part of the trainer that a recovery calls, and that has no state here."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that does nothing."""
        return lambda *_, **__: None


class Trainer:
    """The trainer: its rank is what its environment says.

    Args:
        env: environment variables of the process.
    """

    loggers = ()
    train_dataloader = None

    def __init__(self, env: Mapping[str, str]) -> None:
        self.global_step = 0
        self._env = env

    @property
    def global_rank(self) -> int:
        """This rank."""
        return int(self._env["RANK"])

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(self._env["WORLD_SIZE"])


class Groups:
    """The process groups of a worker; see `membership.worker.process_groups.World`.

    Args:
        worker: the worker.
    """

    def __init__(self, worker: Worker) -> None:
        self.generation = 0
        self._worker = worker

    def open(self, regrouping: int, is_over: Callable[[], bool], when_joined: Callable[[], None]) -> None:
        """Join the current generation, and connect to its ranks."""
        worker, world, env = self._worker, self._worker.world, self._worker.env
        port, rank, world_size = int(env[PORT]), worker.trainer.global_rank, worker.trainer.world_size
        store = world.worker_store(port)
        if regrouping:
            store = PrefixStore(f"ckptless/regrouping-{regrouping}", store)
        generation = join_generation(store, rank, world_size, _JOIN_S, is_over, worker.clock)
        when_joined()
        group = world.group((port, regrouping, generation.number), world_size)
        worker.process.group, worker.process.rank = group, rank
        if world.is_cut_off(worker.process):
            group.stall()
        group.collect(rank, "join", "join", None)
        if is_over():
            raise TransportError(f"rank {rank}: another fault was reported while the process groups were created")
        self.renumber(generation.number)

    def connected(self) -> Group:
        """The groups, which are open."""
        group = self._worker.process.group
        if group is None:
            raise TransportError(f"{self._worker.process} has left its groups")
        return group

    def renumber(self, generation: int) -> None:
        """See `World.renumber`."""
        self.generation = generation

    def abort(self) -> int:
        """See `World.abort`."""
        process = self._worker.process
        if process.group is not None:
            process.group.abort(process.rank)
        return 1

    def leave(self) -> None:
        """See `World.leave`."""
        self.abort()
        self._worker.process.group = None

    def foreign_groups(self) -> int:
        """See `World.foreign_groups`."""
        return 0


class Session:
    """What a rank has over all generations; see `trainer.session.session.Session`.

    Args:
        worker: the worker.
    """

    options = OPTIONS
    loggers = Nothing()
    durable = Nothing()
    device_tier = None

    def __init__(self, worker: Worker) -> None:
        self.trainer = worker.trainer
        self.world = worker.groups
        self.arena = worker.arena
        self.identity = Identity("run", worker.arena.node, 0, True, NOWHERE)
        ledger = SimpleNamespace(record=self._record, generation=1, path=NOWHERE)
        wall = worker.clock.wall
        self.report = RunReport(
            self.trainer, cast("Any", ledger), self.identity, clock=wall, env=worker.env, say=lambda *_: None
        )
        self._worker = worker
        self._members: MemberSet | None = None

    def _record(self, event: str, **fields: Any) -> None:
        self._worker.world.record(event, rank=self.rank, **fields)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.trainer.global_rank

    @property
    def is_member(self) -> bool:
        """Whether this rank has met the others."""
        return self._members is not None

    @property
    def members(self) -> MemberSet:
        """The ranks of the current generation."""
        assert self._members is not None, "this rank has not met the others yet"
        return self._members

    def connect(self) -> tuple[GroupTransport, tuple[str, ...]]:
        """Connect the ranks of the generation; returns also their nodes. All they exchange takes the same way."""
        transport = GroupTransport(self.world.connected(), self.rank)
        return transport, tuple(gather_json(transport, self.identity.node))

    def begin_generation(self, transport: GroupTransport, nodes: tuple[str, ...]) -> MemberSet:
        """Form the member set of a generation."""
        worker = self._worker
        self._members = form_member_set(
            transport, cast("Any", self.arena), nodes, OPTIONS, self.world.generation, count=worker.world.generations
        )
        worker.process.generation = self._members.generation
        return self._members

    def leave_loop(self) -> None:
        """See `Session.leave_loop`."""
        self.report.out_of_steps()
        if self.report.counts != RunCounts():
            self.arena.write_notes(ArenaNotes(counts=self.report.counts))

    def probe(self, moment: str, _: Version) -> None:
        """A moment of a recovery, at which the process may die."""
        self._worker.world.at_moment(self._worker.process, moment)
