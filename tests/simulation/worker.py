"""A worker: the recovery loop, the regroupings, the member set, the watcher and the report of a real one.

What they use is in memory: process groups, arena, mirror, the loops of the trainer and its state, which is one number.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from lightning_ckptless import environment
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.worker.peer_errors import is_lost_peer
from lightning_ckptless.membership.worker.watcher import ABORT_EVERY_S, Watcher
from lightning_ckptless.protocol.messages import (
    CannotRecover,
    FitReturned,
    Message,
    ReachedFit,
    StepCommitted,
)
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.restore import choose, fetch
from lightning_ckptless.trainer.recovery.fit_resume import continue_fit, run_restored
from lightning_ckptless.trainer.recovery.own_process import OwnProcess
from lightning_ckptless.trainer.recovery.recovery_loop import RecoveryLoop
from lightning_ckptless.trainer.recovery.regrouping import Regrouping
from lightning_ckptless.trainer.recovery.restoration import sum_over_ranks
from tests.simulation.arena import FlatLayout, MemoryArena
from tests.simulation.mirroring import Mirroring, Restoration, content, history_in
from tests.simulation.processes import Process, WorkerChannel
from tests.simulation.session import Groups, Nothing, Session, Trainer
from tests.simulation.tasks import Monitor
from tests.simulation.trainer import Loops, Strategy

if TYPE_CHECKING:
    from tests.simulation.world import World

_PEER_LOSS_GRACE_S = 60.0


class Worker:
    """One worker.

    Args:
        world: the simulation.
        process: its process.
        env: its environment variables.
    """

    def __init__(self, world: World, process: Process, env: Mapping[str, str]) -> None:
        self.world = world
        self.process = process
        self.env = dict(env)
        self.clock = Clock(lambda: world.scheduler.now, lambda: world.scheduler.now, world.scheduler.sleep)
        self.trainer = Trainer(self.env)
        self.arena: MemoryArena = world.arenas[process.node]
        self.channel = WorkerChannel(partial(world.send, process))
        self.groups = Groups(self)
        self.session = Session(self)
        self.mirroring = Mirroring(self)
        number = int(self.env.get(environment.REGROUPING, "0"))
        self.watcher = Watcher(
            self.channel, self.groups.abort, number, monitor=Monitor(world.scheduler), clock=self.clock
        )
        self.loops = Loops(self)
        self.running = SimpleNamespace(progress=Nothing(), mirroring=self.mirroring, has_started=False)
        self.data = SimpleNamespace(has_moved=False, virtual_ranks=None, move_to=self._move_data)
        self.to_come: deque[Message] = deque()
        self._has_counted_commit: set[int] = set()
        self._is_aborting = False
        self.history = 0
        strategy: Any = Strategy(self)
        session: Any = self.session
        own = OwnProcess(self.env, self.clock, self._leave, lambda: None)
        procedure: Any = SimpleNamespace(apply=self.apply)
        regrouping = Regrouping(
            strategy, session, cast("Any", self.data), cast("Any", self.running), cast("Any", self.fetch), procedure,
            self.watcher, own,
        )  # fmt: skip
        rewind: Any = SimpleNamespace(stop_if_due=self.mirroring.settle)
        self.loop = RecoveryLoop(
            strategy,
            session,
            cast("Any", self.loops),
            cast("Any", Nothing()),
            regrouping,
            rewind,
            self.watcher,
            own,
        )

    def spawn(self, function: Callable[[], None]) -> None:
        """Start a thread of the process."""
        self.process.tasks.append(self.world.scheduler.spawn(function))

    def _leave(self) -> NoReturn:
        self.world.exit(self.process, 1)
        self.world.scheduler.end_here()

    def _move_data(self, *_: int) -> None:
        self.data.has_moved = True

    # ------------------------------------------------------------------ messages

    def hear_next(self) -> None:
        """A message of the agent has arrived; in a real worker, a thread reads it."""
        self.channel.inbox.append(self.to_come.popleft())
        if self.process.alive:
            self.watcher.read()
            if not self._is_aborting:
                self._abort()

    def _abort(self) -> None:
        self._is_aborting = self.process.alive and self.watcher.has_to_abort
        if self._is_aborting:
            self.watcher.abort_if_due()
            self.world.scheduler.later(ABORT_EVERY_S, self._abort)

    # ------------------------------------------------------------------ the script

    def main(self) -> None:
        """Run the script."""
        self.world.scheduler.sleep(self.world.scheduler.delay(self.world.start_s))
        self.watcher.send(ReachedFit())
        try:
            if self.process.joins:
                self.loop.join_and_run()
            else:
                self.loop.run(self._enter_together())
            self.mirroring.settle()
        except Exception as error:  # noqa: BLE001 - what a script raises, its launcher handles
            self._handle(error)
        self.session.report.finished()
        self.process.finished = True
        self.watcher.send(FitReturned())
        self.world.scheduler.sleep(self.world.scheduler.delay(0.01))
        self.world.exit(self.process, 0)

    def _handle(self, error: Exception) -> NoReturn:
        """See `trainer.strategy.launcher.FitGuard`."""
        self.world.log(f"{self.process} raises {error!r}")
        if self.process.joins and not self.session.is_member:
            self.watcher.send(CannotRecover(repr(error), lasting=True))
            self._leave()
        lost_peer = is_lost_peer(error)
        self.world.scheduler.require(lost_peer, f"{self.process} fails: {error!r}")
        self.world.scheduler.sleep(_PEER_LOSS_GRACE_S)
        self._leave()

    def _enter_together(self) -> Callable[[], None]:
        """See `trainer.session.entry`; returns what runs the loop."""
        self.groups.open(0, lambda: False, lambda: None)
        transport, nodes = self.session.connect()
        members = self.session.begin_generation(transport, nodes)
        self.session.report.take_over(members.noted.counts)
        found = choose(members.arena, transport, nodes)
        if isinstance(found, Complete):
            restoration = self.fetch(found, found)
            return lambda: run_restored(
                cast("Any", self.loops),
                lambda hooks: self.apply(restoration, survivor=False, start_hooks=hooks),
            )
        transport.agree(True)
        self.history = 0
        self.world.note_restored(self.process, None, 0)
        return self._run_from_the_start

    def _run_from_the_start(self) -> None:
        self.loops.on_run_start()
        continue_fit(cast("Any", self.loops), validation_done=True)

    # ------------------------------------------------------------------ restoring

    def fetch(self, found: Complete, host: Complete | None) -> Restoration:
        """Fetch a version; see `trainer.recovery.fetch`."""
        members, written = self.session.members, found.snapshot.world_size
        rank, world_size = members.rank, members.world_size
        home = rank % written
        need = (
            FlatLayout(written).need if written == world_size else {each: range(written) for each in range(world_size)}
        )
        blobs = {each: (each % written,) for each in range(world_size)}
        fetched = fetch(found, members.arena, members.transport, members.nodes, need=need, blobs=blobs)
        step, history = found.snapshot.version.optimizer_step, history_in(fetched.bulks[home])
        for shard, bulk in fetched.bulks.items():
            is_right = torch.equal(bulk, content(step, shard, history))
            self.world.scheduler.require(is_right, f"{self.process}: shard {shard} is not that of {found.reason}")
        is_one = set(members.gather([history])[0]) == {history}
        self.world.scheduler.require(is_one, f"{self.process} restores another state than rank 0: {found.reason}")
        begun = [step for steps in members.gather(list(self.arena_begun())) for step in steps]
        saved: dict[str, Any] = json.loads(fetched.blobs[home])
        self.session.report.fetched(found, host, sum_over_ranks(fetched, members), min(begun, default=0))
        return Restoration(found, host, fetched.bulks[home], saved)

    def arena_begun(self) -> list[int]:
        """The steps that the ranks of this node have begun."""
        return list(self.world.begun.get(self.process.node, {}).values())

    def apply(
        self,
        restoration: Restoration,
        *,
        survivor: bool,
        moved: bool = False,
        start_hooks: Callable[[], None] | None = None,
    ) -> Version:
        """Put a version into this rank; see `trainer.recovery.restore_procedure`."""
        version = restoration.version
        if start_hooks is not None:
            start_hooks()
        self.trainer.global_step = self.process.step = version.optimizer_step
        self.history = history_in(restoration.bulk)
        self.data.has_moved = False
        self.world.note_restored(self.process, version, self.history)
        self.session.report.resume(restoration.saved["report"])
        self.mirroring.resume(restoration)
        return version

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """Make a step together with all other ranks."""
        world, rank, group = self.world, self.session.rank, self.groups.connected()
        self.session.report.begin_training()
        self.watcher.heed()
        step = self.trainer.global_step + 1
        world.begun.setdefault(self.process.node, {})[rank] = step
        world.scheduler.sleep(world.scheduler.delay(world.pace_s))
        group.collect(rank, "train", f"step {step}", None)
        world.note_trained(self.process, step)
        self.trainer.global_step = self.process.step = step
        self.history = group.after_step(self.history)

    def commit(self) -> None:
        """Capture the version of the step."""
        self.watcher.heed()
        self.mirroring.commit(Version(self.trainer.global_step, True))
        generation = self.session.members.generation
        if generation not in self._has_counted_commit:
            self._has_counted_commit.add(generation)
            self.watcher.send(StepCommitted(self.session.members.sole_shards))

    def note_committed(self, generation: int, version: Version, history: int) -> None:
        """This rank has learned that all have voted for a version."""
        self.world.note_committed(self.process, generation, version, history)
        if self.session.report.committed(version):
            self.world.mark_begun(self.process)
