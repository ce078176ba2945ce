"""The engine behind a strategy: opens the arena, mirrors every version, restores one after a relaunch.

It owns the order of things and decides nothing: what to restore is decided by `protocol`, how bytes move by `replica`,
when a version exists by `step`, how the loops are entered by `drive`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.membership.communicators import host_group
from lightning_ckptless.membership.reaper import MARKER, start_reaper
from lightning_ckptless.membership.verdict import Verdict, leave_verdict, mark_begun
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.placement import Placement, place
from lightning_ckptless.protocol.start import StartAction, StartPlan, plan_start
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.layout import Layout, plan_layout
from lightning_ckptless.replica.mirror import Mirror
from lightning_ckptless.replica.replenish import replenish
from lightning_ckptless.replica.restore import Fetched, choose, fetch, shared_layout
from lightning_ckptless.replica.transport import GlooTransport, SoloTransport, Transport
from lightning_ckptless.trainer.arenas import is_first_of_node, local_rank, open_arena
from lightning_ckptless.trainer.begun import BegunStep, step_in_flight
from lightning_ckptless.trainer.checkpoints import files_of_the_future, newest_checkpoint, note_of_save
from lightning_ckptless.trainer.compatibility import warn_of_loaders
from lightning_ckptless.trainer.data import move_data_to
from lightning_ckptless.trainer.drive import run_restored
from lightning_ckptless.trainer.host import loggers as host_loggers
from lightning_ckptless.trainer.host.loops import FitLoops
from lightning_ckptless.trainer.identity import Identity, identify
from lightning_ckptless.trainer.judgement import why_final
from lightning_ckptless.trainer.plain import pack, unpack
from lightning_ckptless.trainer.report import Moved, RunReport
from lightning_ckptless.trainer.rng import apply_rng
from lightning_ckptless.trainer.snapshot import SmallState
from lightning_ckptless.trainer.state import StateIndex
from lightning_ckptless.trainer.step import StepBoundaries
from lightning_ckptless.trainer.tensors import describe_state, fill_trainer

log = logging.getLogger(__name__)
COMMIT_TIMEOUT_S = 1800.0
CLOSE_TIMEOUT_S = 10.0


class Restored:
    """A version fetched from the arenas, waiting for the trainer that takes it."""

    def __init__(self, complete: Complete, layout: Layout, bulks: Any, small: dict[str, Any]) -> None:
        self.complete = complete
        self.version = complete.snapshot.version
        self.layout = layout
        self.bulks = bulks
        self.small = small


class Engine:
    """Fault tolerance of one call of `fit`.

    Args:
        trainer: in `fit`, before anything of it is set up; the process group exists.
        options: the user's settings.
        generation: number of the membership.
        chapter: how many times `fit` was entered before in this process.
        probes: called in the mirror thread with the moment of a round and its version.
    """

    def __init__(
        self,
        trainer: Any,
        options: CkptlessOptions,
        generation: int,
        chapter: int,
        probes: list[Callable[[str, Version], None]],
    ) -> None:
        self.trainer = trainer
        self.options = options
        self.generation = generation
        self.chapter = chapter
        self.probes = probes
        self.rank: int = trainer.global_rank
        self.world_size: int = trainer.world_size
        self.identity: Identity = identify(trainer)
        self.run_folder: Path = self.identity.run_folder
        self.ledger = Ledger(self.run_folder / "ledger.jsonl")
        self.report = RunReport(trainer, self.ledger, generation)
        self.transport: Transport = self._connect()
        self.mirror: Mirror | None = None
        self.restored: Restored | None = None
        self.boundaries: StepBoundaries | None = None
        self._index: StateIndex | None = None
        self._small: SmallState | None = None
        self._taken: Version | None = None

    def _connect(self) -> Transport:
        if self.world_size == 1:
            return SoloTransport()
        return GlooTransport(host_group(COMMIT_TIMEOUT_S))

    # ------------------------------------------------------------------ begin

    def begin(self, ckpt_path: str | None) -> StartPlan:
        """Open the arena and decide what this generation starts from.

        Raises:
            LaunchError: as many recoveries were made as the options allow.
            StateMissingError: nothing complete is left and the options say to stop.
            WorldSizeError: the state was mirrored by another number of ranks.
            OptionsError: the checkpoint path and a live arena disagree, or replicas cannot be placed.
        """
        opens = is_first_of_node(local_rank())
        self.arena, self.nodes = open_arena(
            self.identity, self.chapter, self.options, self.transport, opens=opens, origin=ckpt_path
        )
        if opens and not self.identity.own_agent:
            self._have_arena_reaped()
        self.placement: Placement = place(self._domains(), self._copies())
        notes = self._notes()
        relaunched = self.generation > 1
        self._go_beyond(notes, opens)
        self._name_logs(notes)
        found = choose(self.arena, self.transport, self.nodes)
        plan = plan_start(
            found=found,
            generation=self.generation,
            world_size=self.world_size,
            relaunched=relaunched,
            had_commit=any(n.get("committed") for n in notes),
            ckpt_path=ckpt_path,
            origin=next((n["origin"] for n in notes if n.get("origin")), None),
            durable=None if isinstance(found, Complete) else self._newest_checkpoint(),
            on_unrecoverable=self.options.on_unrecoverable,
        )
        self.report.started(self.identity, plan, self.placement, self.arena.path)
        if plan.action is StartAction.REFUSE:
            assert plan.error is not None
            raise plan.error(plan.reason)
        if plan.action is StartAction.RESTORE:
            assert isinstance(found, Complete)
            self._count_recovery(notes, opens)
            self._fetch(found)
        else:
            self._start_over(plan.action, opens)
        return plan

    def _have_arena_reaped(self) -> None:
        """An agent that is not ours knows nothing of arenas: one process per arena waits for its end."""
        agent = self.identity.agent_pid
        if self.arena.notes().get("reaped with") != agent:
            start_reaper(agent, str(self.arena.path))
            self.arena.note("reaped with", agent)

    def _domains(self) -> tuple[str, ...]:
        if self.options.failure_domain == "rank":
            return tuple(f"rank{rank}" for rank in range(self.world_size))
        return self.nodes

    def _copies(self) -> int:
        return self.options.copies if self.world_size > 1 else 0

    def _notes(self) -> list[dict[str, Any]]:
        lines = self.transport.gather(json.dumps(self.arena.notes()).encode())
        return [json.loads(line) for line in lines]

    def _go_beyond(self, notes: list[dict[str, Any]], opens: bool) -> None:
        """A run that is started again counts on: two memberships never write under one number into an arena."""
        self.generation = max([self.generation, *(int(n["generation"]) + 1 for n in notes if "generation" in n)])
        self.report.generation = self.generation
        if opens:
            self.arena.note("generation", self.generation)

    def _count_recovery(self, notes: list[dict[str, Any]], opens: bool) -> None:
        """Count over all starts of the run: under another agent only we know the user's limit."""
        most, count = self.options.max_recoveries, 1 + max(int(n.get("recoveries", 0)) for n in notes)
        if count > most:
            raise LaunchError(
                f"rank {self.rank}: max_recoveries={most} recoveries were made, and the run has failed again: look for "
                "the cause in its ledger; raise max_recoveries to go on from the arenas"
            )
        if opens:
            self.arena.note("recoveries", count)

    def _name_logs(self, notes: list[dict[str, Any]]) -> None:
        """Loggers of a relaunch write into the folders of the run; asking for their paths must not choose new ones."""
        saved = next((n["logger_versions"] for n in notes if n.get("logger_versions")), None)
        self._logs_are_named = saved is not None
        if saved is not None:
            host_loggers.set_versions(self.trainer.loggers, saved)
            host_loggers.note_saved_config(self.trainer.callbacks, saved=True)

    def _newest_checkpoint(self) -> str | None:
        return newest_checkpoint(self.trainer) if self._logs_are_named else None

    def _fetch(self, found: Complete) -> None:
        layout = shared_layout(self.arena, self.transport, found.snapshot.layout)
        everything = {rank: tuple(range(self.world_size)) for rank in range(self.world_size)}
        fetched = fetch(found, self.arena, self.transport, self.nodes, need=everything)
        small = unpack(fetched.blob)
        self.restored = Restored(found, layout, fetched.bulks, small)
        self._taken = found.snapshot.version
        self.report.fetched(found, self._sum_over_ranks(fetched), step_in_flight(self.arena.path, self.transport))
        self._forget_the_future(found.snapshot.version)
        if self.trainer.is_global_zero:
            host_loggers.cut_logs(self.trainer, small["state"]["logs"])

    def _sum_over_ranks(self, fetched: Fetched) -> Moved:
        lines = self.transport.gather(json.dumps([fetched.moved_bytes, fetched.sources]).encode())
        moved = [json.loads(line) for line in lines]
        sources: Counter[str] = Counter()
        for _, of_rank in moved:
            sources.update(of_rank)
        return Moved(sum(moved_bytes for moved_bytes, _ in moved), dict(sources))

    def _forget_the_future(self, version: Version) -> None:
        if not self.trainer.is_global_zero:
            return
        notes = [event.fields for event in read_ledger(self.ledger.path).events if event.event == "checkpoint"]
        for path in files_of_the_future(notes, version):
            log.warning("ckptless: removed %s: it was written after %s, which the run goes back to", path, version)
            path.unlink()

    def _start_over(self, action: StartAction, opens: bool) -> None:
        self.transport.agree(True)
        if opens:
            self.arena.clear()
        if action is StartAction.DURABLE:
            # As on any resume from a file: a new folder, the rows of the old one stay as they are.
            host_loggers.forget_versions(self.trainer.loggers)
            host_loggers.note_saved_config(self.trainer.callbacks, saved=False)
        elif self._logs_are_named and self.trainer.is_global_zero:
            host_loggers.cut_logs(self.trainer, host_loggers.empty_positions(self.trainer.loggers))

    # ------------------------------------------------------------------ run

    def attach(self) -> None:
        """Called when the model, its optimizers and the loops are set up: take over the commit points."""
        trainer = self.trainer
        if trainer.is_global_zero:
            host_loggers.watch_logs(trainer.loggers)
        if is_first_of_node(local_rank()):
            self.arena.note("logger_versions", host_loggers.name_versions(trainer.loggers))
        loops = FitLoops(trainer)
        self.loops = loops
        self._begun = BegunStep(self.arena.path, self.rank)
        self.boundaries = StepBoundaries(
            loops, self.commit, every_n_steps=self.options.mirror_every_n_steps, since=self._taken
        )
        if self.restored is not None:
            restored = self.restored
            loops.fit.run = lambda: run_restored(
                loops, tail_done=restored.version.tail_done, restore=self._restore, settle=self._settle
            )

    def detach(self) -> None:
        """Give the loops their own methods back."""
        if self.boundaries is not None:
            self.boundaries.remove()
            vars(self.loops.fit).pop("run", None)

    def _restore(self) -> None:
        restored = self.restored
        assert restored is not None
        self._index = fill_trainer(
            self.trainer, restored.layout, restored.bulks, rank=self.rank, world_size=self.world_size
        )
        self._small = SmallState(self.trainer)
        self._small.apply(restored.small["state"])

    def _settle(self) -> None:
        restored, small = self.restored, self._small
        assert restored is not None and small is not None
        small.apply(restored.small["state"])
        self.loops.set_sampler_epochs()
        move_data_to(self.loops, restored.small["state"]["data"])
        self.report.protected(replenish(restored.complete, self.arena, self.transport, self.nodes, self.placement))
        self.report.resume(restored.small["report"])
        self._open_mirror(restored.layout, committed=restored.version)
        self.restored = None
        apply_rng(restored.small["state"]["rng"])

    # ------------------------------------------------------------------ mirror

    def commit(self, version: Version) -> None:
        """Take a version and hand it to the mirror. Called in the training thread at a commit point."""
        self.report.step_done()
        began = time.perf_counter()
        if self._small is None:
            self._small = SmallState(self.trainer)
            if self.rank == 0:
                warn_of_loaders(self.loops.combined_loader.flattened)
        if self._index is None or not self._index.is_current():
            self._plan_anew()
        assert self._index is not None and self.mirror is not None
        if self.options.on_late == "skip" and self.mirror.busy:
            self.mirror.skip(version)
            self.report.taken(0.0, time.perf_counter() - began, self.mirror)
            return
        blob = pack(
            {
                "state": self._small.capture(),
                "report": self.report.state(),
                "logger_versions": host_loggers.name_versions(self.trainer.loggers),
            }
        )
        stall_s = self.mirror.submit(version, self._index.read(), blob, blocking_names=self._index.private)
        self._taken = version
        self.report.taken(stall_s, time.perf_counter() - began, self.mirror)

    def at_batch_start(self) -> None:
        """Note which step is begun."""
        self._begun.stamp(self.trainer.global_step + 1)

    def before_optimizer_step(self) -> None:
        """Wait until the version under way is copied: the optimizer is about to change the tensors."""
        if self.mirror is not None:
            self.report.waited(self.mirror.wait_staged())

    def _plan_anew(self) -> None:
        if self.mirror is not None:
            self.mirror.settle()
        self._index = StateIndex(self.trainer)
        mine = pack(describe_state(self._index))
        layout = plan_layout([unpack(line) for line in self.transport.gather(mine)])
        committed = self.mirror.committed if self.mirror is not None else None
        self._open_mirror(layout, committed=committed)

    def _open_mirror(self, layout: Layout, *, committed: Version | None) -> None:
        if self.mirror is not None:
            self.mirror.close()
        if is_first_of_node(local_rank()):
            self.arena.write_layout(layout)
        self.mirror = Mirror(
            arena=self.arena,
            layout=layout,
            placement=self.placement,
            transport=self.transport,
            generation=self.generation,
            checksum=self.options.checksum,
            committed=committed,
            probe=self._probe,
            staging=self.options.staging,
        )

    def _probe(self, moment: str, version: Version) -> None:
        if moment == "committed" and self.report.committed(version):
            mark_begun(self.rank)
            if is_first_of_node(local_rank()):
                self.arena.note("committed", {"step": version.optimizer_step, "tail_done": version.tail_done})
        for probe in list(self.probes):
            probe(moment, version)

    def saving_checkpoint(self, path: str) -> None:
        """Called before a checkpoint file is written by this rank."""
        self.ledger.record(
            "checkpoint",
            generation=self.generation,
            rank=self.rank,
            **note_of_save(path, self._taken, os.path.exists(path)),
        )

    # ------------------------------------------------------------------ end

    def why_final(self, error: Exception) -> str | None:
        """Why an exception is not worth another try; None where it is."""
        return why_final(error, rank=self.rank, taken=self._taken, arena=getattr(self, "arena", None))

    def leave_verdict(self, reason: str) -> None:
        """Tell our agent not to start the workers again."""
        leave_verdict(Verdict(self.rank, final=True, reason=reason))

    def finish(self) -> None:
        """Called when `fit` returned: wait for the last version and say how it went."""
        if self.mirror is not None:
            self.mirror.settle()
        if is_first_of_node(local_rank()):
            self.arena.note("finished", True)
            (self.arena.path / MARKER).touch()
        self.report.finished()

    def close(self) -> None:
        """Release threads and mappings; the arena stays for a relaunch, its agent removes it."""
        self.detach()
        if self.mirror is not None:
            self.mirror.close(CLOSE_TIMEOUT_S)
            self.mirror = None
        self.restored = None
        self.transport.close()
        if hasattr(self, "arena"):
            self.arena.close()
