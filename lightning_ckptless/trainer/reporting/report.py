"""What a run reports: ledger events, logged metrics, the progress bar and one line on stderr per recovery."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.internals.lightning.results import show_on_progress_bar
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.watcher import Assignment
from lightning_ckptless.protocol.divergence import Judgement
from lightning_ckptless.protocol.mirror_interval import IntervalPlan
from lightning_ckptless.protocol.mtbf import Mtbf, observed_mtbf
from lightning_ckptless.protocol.phases import PHASE_FIELDS, Phases, phases_from
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.placement_table import table_of
from lightning_ckptless.protocol.recovery import Rung
from lightning_ckptless.protocol.replacement_startup import Arrival
from lightning_ckptless.protocol.replay_check import ReplayJudgement
from lightning_ckptless.protocol.rewind import RewindPlan
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.startup import StartPlan
from lightning_ckptless.protocol.time_account import Bucket, Outage, TimeAccount
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.protocol.wording import counted
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.rereplicate import Rereplicated
from lightning_ckptless.trainer.reporting import sentences
from lightning_ckptless.trainer.reporting.logged_values import TakenVersion, logged_values
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from lightning_ckptless.trainer.reporting.run_clock import RunClock, agent_started_at
from lightning_ckptless.trainer.reporting.tensorboard_layout import lay_out
from lightning_ckptless.trainer.reporting.unreported_faults import UnreportedFaults
from lightning_ckptless.trainer.session.identity import Identity
from lightning_ckptless.trainer.session.member_set import MemberSet

PREFIX = "ckptless/"
NOTE_EVERY_S = 1.0
"""Minimum seconds between two `committed` events in the ledger."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a restored state came from, over all ranks.

    Args:
        moved_bytes: bytes sent between ranks.
        sources: shards read from the `own arena` and received from a `peer`.
    """

    moved_bytes: int
    sources: dict[str, int]


class RunReport:
    """Collects the figures of one generation and reports them.

    Args:
        trainer: its loggers and progress bar receive the values.
        ledger: ledger of the run, shared by all its relaunches.
        identity: which agent has started this process.
        fit_index: number of earlier calls of `fit` in this process.
        clock: returns seconds since the epoch.
        env: environment variables of this process.
        say: prints a message, given the trainer.

    Attributes:
        time: what the training thread spends its time on.
        counts: recoveries and rewinds so far.
    """

    def __init__(
        self,
        trainer: Any,
        ledger: RankLedger,
        identity: Identity,
        fit_index: int = 0,
        clock: Callable[[], float] = time.time,
        env: Mapping[str, str] = os.environ,
        say: Callable[[Any, str], None] = progress_bar.say,
    ) -> None:
        self.trainer = trainer
        self.ledger = ledger
        self.clock = clock
        self._env = env
        self._print = say
        self._own_agent = identity.own_agent
        self._agent_at = agent_started_at(identity.agent_pid, own_agent=identity.own_agent, env=env)
        # A later `fit` begins where the script calls it: what it does before is not ours to account for.
        self.time = RunClock(ledger, clock() if fit_index else self._agent_at, clock)
        self.counts = RunCounts()
        self.last_phases: Phases | None = None
        self._fault = _fault_report(env)
        self._unreported = UnreportedFaults(self._fault)
        self._notified_at: float | None = None
        self._arrivals: Sequence[Arrival] = ()
        self._in_place = self._has_counts = self._is_followed = False
        self._rewind: tuple[RewindPlan, float] | None = None
        self._joined_at = clock()
        self._resumed_at: float | None = None
        self._restored: Version | None = None
        self._moved: Moved | None = None
        self._stall_s = 0.0
        self._versions = 0
        self._taken: TakenVersion | None = None
        self._is_laid_out = False
        self._last_noted_at = 0.0
        self._plan: tuple[Placement, tuple[str, ...], tuple[int, ...]] | None = None
        self._is_plan_shown = False

    @property
    def account(self) -> TimeAccount:
        """The time of the run so far."""
        return self.time.account

    @property
    def mtbf(self) -> Mtbf:
        """The mean time between failures that the run has observed."""
        return observed_mtbf(self.counts.failures, self.account.wall_s)

    @property
    def is_reporter(self) -> bool:
        """Whether this rank reports for all. It is rank 0, which a world change may make another process."""
        return int(self.trainer.global_rank) == 0

    def report_files(self, text: str) -> None:
        """Print a message about the run's checkpoint and log files."""
        self._say(text)

    def _say(self, text: str) -> None:
        self._print(self.trainer, text)

    # ------------------------------------------------------------------ the start of a generation

    def started(
        self,
        identity: Identity,
        plan: StartPlan,
        placement: Placement,
        arena: Path,
        *,
        fit_index: int,
        had_ended: bool,
        is_followed: bool,
    ) -> None:
        """Report what this generation starts from.

        Args:
            identity: identity of the run.
            plan: how the generation starts.
            placement: which rank holds which replicas.
            arena: folder of this node's arena.
            fit_index: number of earlier calls of `fit` in this process.
            had_ended: whether this `fit` had returned before the fault, on one rank at least.
            is_followed: whether a later `fit` has versions: it reports the recovery.
        """
        self._is_followed = is_followed
        if not self.is_reporter:
            return
        self.ledger.record(
            "run_started",
            run_id=identity.run_id,
            world_size=self.trainer.world_size,
            action=str(plan.action),
            reason=plan.reason,
            placement=placement.reason,
            arena=str(arena),
        )
        if self.ledger.generation == 1 and fit_index == 0:
            self._say(f"run {identity.run_id}: {placement.reason}")
        self._say(sentences.start_line(plan.reason, fit_index, had_ended=had_ended))

    def planned(self, members: MemberSet, sizes_bytes: Sequence[int], version: Version, slots: int) -> None:
        """Report the placement once the layout of the state is known.

        Args:
            members: the member set.
            sizes_bytes: size of each shard.
            version: version with this layout; the first one has no optimizer state yet.
            slots: number of slots of each replica.
        """
        placement = members.placement
        plan = (placement, members.nodes, tuple(sizes_bytes))
        if not self.is_reporter or plan == self._plan:
            return
        self._plan = plan
        self.ledger.record(
            "placement",
            kind=placement.kind,
            copies=placement.copies,
            holders=placement.holders,
            domains=placement.domains,
            nodes=members.nodes,
            sizes_bytes=sizes_bytes,
            slots=slots,
            version=str(version),
        )
        if placement.copies and version.optimizer_step and self.ledger.generation == 1 and not self._is_plan_shown:
            self._is_plan_shown = True
            table = table_of(placement, sizes_bytes, kind=placement.kind, slots=slots)
            self._say("\n  ".join(["placement of the replicas:", *table.lines()]))

    def faulted(self, assignment: Assignment) -> None:
        """Record a fault that this rank survived, or after which it joins."""
        self._fault = self._unreported.add(assignment.fault)
        self._notified_at = assignment.notified_at
        self._resumed_at = self._rewind = None
        self._in_place = True

    def regrouped(self, arrivals: Sequence[Arrival]) -> None:
        """Record that the ranks of the next generation have regrouped.

        Args:
            arrivals: startup figures of its new processes.
        """
        self._arrivals = arrivals
        self._joined_at = self.clock()

    def fetched(self, found: Complete, host: Complete | None, moved: Moved, step_in_flight: int) -> None:
        """Record that a version has been read.

        Args:
            found: the version.
            host: the newest version in the arenas; None if they contain none.
            moved: where it came from.
            step_in_flight: the last step that all ranks had begun.
        """
        self._moved = moved
        self._restored = found.snapshot.version
        self._replayed_now = max(0, step_in_flight - found.snapshot.version.optimizer_step)
        if self.is_reporter:
            self.ledger.record(
                "restored",
                version=str(self._restored),
                newest_in_arenas=None if host is None else str(host.snapshot.version),
                sources=moved.sources,
                moved_bytes=moved.moved_bytes,
            )

    def protected(self, replenished: Rereplicated) -> None:
        """Report that the restored version has all its replicas again; silent if none was missing."""
        if not self.is_reporter or not replenished.pairs:
            return
        self.ledger.record(
            "protection",
            version=str(self._restored),
            copied_bytes=replenished.copied_bytes,
            sent_bytes=replenished.sent_bytes,
            pairs=[list(pair) for pair in replenished.pairs],
            reason=replenished.reason,
        )
        self._say(replenished.reason)

    def world_changed(self, before: int, reason: str) -> None:
        """Report that a version of another world size has been adopted and mirrored by these ranks."""
        self.account.advance(self.clock(), Bucket.ELASTIC_TRANSITION)
        if self.is_reporter:
            self.ledger.record("world_changed", before=before, world_size=self.trainer.world_size, reason=reason)
            self._say(reason)

    def begin_training(self) -> None:
        """Count the time as training from now on, unless it already is; called before each batch."""
        self.time.begin_training(None if self._fault is None else self._outage())

    def resume(self, saved: dict[str, Any]) -> None:
        """Adopt the accounts of the restored version; training is about to resume."""
        if self._rewind is not None:
            self.time.end_rewind(saved["time"])
        else:
            if not self._has_counts:
                self._adopt_counts(saved)
            self.time.resume(saved["time"], self._outage())
            self._resumed_at = self.clock()
        self._note_time()

    def take_over(self, counts: RunCounts | None) -> None:
        """Take over what earlier processes have counted until they left the training loop; None if they have not."""
        if counts is not None:
            self.counts = counts

    def _adopt_counts(self, saved: dict[str, Any]) -> None:
        """Adopt the counts of earlier processes. What this one has counted itself is not undone by a rollback."""
        self._has_counts = True
        self.counts = self.counts.or_later(RunCounts(**saved["counts"]))
        self._unreported.settle(self.counts.regrouped_at)
        self._fault = None if self._fault is None else self._unreported.add(self._fault)
        if saved["phases"]:
            self.last_phases = Phases(**saved["phases"])

    def state(self, version: Version) -> dict[str, Any]:
        """The accounts, stored with each version so that rolled back steps are not counted.

        Args:
            version: the version. If it is restored, it has been committed, which ends the recovery under way.
        """
        restored, phases = self._restored, self.last_phases
        is_open = self._resumed_at is not None
        ends = is_open and restored is not None and version.optimizer_step > restored.optimizer_step
        return {
            "time": self.time.state(),
            "counts": asdict(self._counts_after() if ends else self.counts),
            "phases": None if phases is None else asdict(phases),
        }

    def _counts_after(self) -> RunCounts:
        """The counts after the recovery under way."""
        return self.counts.after_recovery(self._replayed_now, self._joined_at, is_failure=not self._has_grown)

    @property
    def _has_grown(self) -> bool:
        return self._fault is not None and bool(self.trainer.world_size > self._fault.world_size)

    def _outage(self) -> Outage:
        fault = self._fault
        if fault is None:
            unseen = None if self._own_agent else psutil.Process().create_time()
            return Outage(
                agent_at=self._agent_at if self._own_agent else None, process_at=unseen, regrouped_at=self._joined_at
            )
        return Outage(
            recovering_since=fault.recovering_since,
            fault_at=fault.died_at,
            detected_at=fault.detected_at,
            stopped_at=self._notified_at if self._in_place else fault.stopped_at,
            regrouped_at=self._joined_at,
            grows=self._has_grown,
        )

    # ------------------------------------------------------------------ steps

    def mirror_interval(self, interval: int, plan: IntervalPlan) -> None:
        """Report the mirror interval that all ranks have agreed on."""
        if self.is_reporter:
            costs = plan.costs
            self.ledger.record(
                "mirror_interval",
                interval=interval,
                reason=plan.reason,
                step_s=costs.step_s,
                version_s=costs.version_s,
            )
            every = counted(interval, "step")
            self._say(f"a version is mirrored every {every} from now on; rank 0 proposed {plan.reason}")

    def waited(self, stall_s: float) -> None:
        """Add seconds for which the optimizer step waited for a copy."""
        self._stall_s += stall_s

    def step_done(self) -> None:
        """Log the values of the step before; called just before the state of this one is captured."""
        self.time.touch()
        if self.time.is_note_due:
            self._note_time()
        if self.time.is_note_of_rank_due:
            self.time.note_rank()
        if self._taken is not None:
            self._log_values(self._taken)

    def taken(self, stall_s: float, cost_s: float, mirror: Mirror) -> None:
        """Record the cost of the step's version, which has been handed to the mirror."""
        self._versions += 1
        self._taken = TakenVersion(stall_s + self._stall_s, cost_s, mirror.stats)
        self._stall_s = 0.0

    def _log_values(self, taken: TakenVersion) -> None:
        trainer = self.trainer
        stepped = trainer.fit_loop.epoch_loop.global_step
        is_due = bool(trainer.loggers and trainer.log_every_n_steps and stepped % trainer.log_every_n_steps == 0)
        if not (self.counts.recoveries or is_due) or not self.is_reporter:
            return
        if self.counts.recoveries:
            # Until the first recovery the bar shows the same metrics as under DDP.
            shown = {"goodput": round(self.account.goodput, 3), "recoveries": float(self.counts.recoveries)}
            show_on_progress_bar(trainer, shown)
        if is_due:
            if not self._is_laid_out:
                self._is_laid_out = True
                lay_out(trainer.loggers, PREFIX)
            values = logged_values(taken, self.account, self.mtbf, self.last_phases, self.counts)
            prefixed = {f"{PREFIX}{name}": value for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics(prefixed, step=max(0, stepped - 1))
                logger.save()

    def committed(self, version: Version) -> bool:
        """Record that a version is committed on all ranks; returns whether it is the first of this generation."""
        now = self.clock()
        if self.is_reporter and now - self._last_noted_at >= NOTE_EVERY_S:
            self._last_noted_at = now
            self.ledger.record(
                "committed",
                step=version.optimizer_step,
                validation_done=version.validation_done,
                of=_steps_in_all(self.trainer),
            )
        if self._restored is None:
            self._restored = version
            self._settle()
            return True
        if self._resumed_at is None or version.optimizer_step <= self._restored.optimizer_step:
            return False
        self._recovered()
        return True

    def out_of_steps(self) -> None:
        """Close a recovery that no further step will follow; training has ended."""
        self.time.end_training()
        if self._resumed_at is not None and self._restored is not None:
            self._recovered()

    # ------------------------------------------------------------------ rewinds

    def rewinding(self, plan: RewindPlan) -> None:
        """Record that all ranks begin to go back."""
        self._rewind = plan, self.clock()
        self.counts = self.counts.after_rewind()
        self.time.begin_rewind()

    def rewound(self, skipped_batches: int) -> None:
        """Report that training resumes from the version of the plan, with a number of batches of each rank skipped."""
        assert self._rewind is not None
        (plan, began_at), self._rewind = self._rewind, None
        if not self.is_reporter:
            return
        took_s = self.clock() - began_at
        self.ledger.record(
            "rewind",
            from_step=plan.from_step,
            version=str(plan.version),
            skipped_batches=skipped_batches,
            reason=plan.reason,
            in_a_row=plan.past.count,
            took_s=round(took_s, 6),
        )
        self._say(sentences.rewind_line(plan.reason, skipped_batches, took_s))

    def rewind_refused(self, reason: str) -> None:
        """Report that a rewind is not carried out."""
        if self.is_reporter:
            self.ledger.record("rewind_refused", reason=reason)
            self._say(f"not rewound: {reason}")

    def diverged(self, facts: Mapping[str, Any], found: Judgement | ReplayJudgement) -> None:
        """Report that ranks differ where they should not.

        Args:
            facts: what was found, as fields of an event.
            found: what follows.
        """
        if self.is_reporter:
            consequence = found.consequence.name.lower()
            self.ledger.record("divergence", **facts, consequence=consequence, in_a_row=found.past.count)
            if found.version is None:
                # Otherwise the reason is that of the rewind.
                self._say(f"ranks differ: {found.reason}")

    # ------------------------------------------------------------------ recoveries

    def _settle(self) -> None:
        """Record that no recovery is under way."""
        self._resumed_at, self._has_counts = None, True
        self._unreported.settle(self._joined_at)

    def _recovered(self) -> None:
        assert self._restored is not None and self._resumed_at is not None
        if self._is_followed:
            self._settle()
            return
        fault, now = self._fault, self.clock()
        phases = phases_from(
            fault_at=fault.died_at if fault else None,
            detected_at=fault.detected_at if fault else None,
            stopped_at=self._notified_at if self._in_place else fault.stopped_at if fault else None,
            regrouped_at=self._joined_at,
            restored_at=self._resumed_at,
            first_step_done_at=now,
        )
        if fault is not None:
            # Earlier attempts that another fault cut short count as part of this recovery.
            phases = replace(phases, other_s=phases.other_s + fault.failed_tries_s)
        restored, self.last_phases, self.counts = self._restored, phases, self._counts_after()
        self._settle()
        if not self.is_reporter:
            return
        assert self._moved is not None
        named = {name: round(getattr(phases, name), 6) for name in PHASE_FIELDS}
        self.ledger.record(
            "recovery",
            rung=str(Rung.IN_PLACE if self._in_place else Rung.RELAUNCH),
            kind=fault.kind if fault else "lost",
            culprit_rank=fault.rank if fault else None,
            cause=sentences.cause_of(fault),
            version=str(restored),
            steps_replayed=self._replayed_now,
            phases=named,
            total_s=round(phases.total_s, 6),
            sources=self._moved.sources,
            moved_bytes=self._moved.moved_bytes,
            spawned_at=_float(self._env, environment.SPAWNED_AT),
            main_at=_float(self._env, environment.MAIN_AT),
            joined_at=self._joined_at,
            replacements=[asdict(arrival) for arrival in self._arrivals],
        )
        ranks, steps = counted(self.trainer.world_size, "rank"), counted(self._replayed_now, "step")
        where = f"resumed from {restored} on {ranks}, {steps} replayed"
        self._say(sentences.recovery_line(fault, where, phases, self._arrivals, in_place=self._in_place))

    # ------------------------------------------------------------------ the end

    def finished(self) -> None:
        """Report the end of `fit`."""
        self.time.note_rank()
        if not self.is_reporter:
            return
        self._note_time(is_over=True)
        account = self.account
        self.ledger.record(
            "run_ended",
            goodput=account.goodput,
            goodput_1h=account.recent_goodput,
            recoveries=self.counts.recoveries,
            steps_replayed=self.counts.steps_replayed,
            wall_s=account.wall_s,
        )
        for line in sentences.end_lines(account, self.counts, self.mtbf):
            self._say(line)

    def stopped(self, error: BaseException) -> None:
        """Record that the run was asked to stop."""
        self._note_time()
        self.ledger.record("stopped", cause=type(error).__name__)

    def _note_time(self, *, is_over: bool = False) -> None:
        if self.is_reporter:
            self.time.note(
                is_over=is_over,
                step=int(self.trainer.global_step),
                versions=self._versions,
                failures=self.counts.failures,
                steps_replayed=self.counts.steps_replayed,
            )

    def peer_lost(self, error: Exception) -> None:
        """Record that another rank was lost; this one waits for its agent."""
        self.ledger.record("peer_lost", cause=f"{type(error).__name__}: {error}"[:300])

    def raised(self, error: Exception) -> None:
        """Report an exception that the script raised for the first time at this step."""
        self.ledger.record("raised", cause=f"{type(error).__name__}: {error}"[:300], final=False)
        self._say(
            f"rank {self.trainer.global_rank}: {type(error).__name__} in the script; retrying once from the last "
            "version, and ending the run if it is raised again"
        )

    def failed(self, error: Exception, reason: str) -> None:
        """Report the exception that ends the run."""
        self._note_time()
        self.ledger.record("raised", cause=f"{type(error).__name__}: {error}"[:300], final=True, reason=reason)
        self._say(f"rank {self.trainer.global_rank}: not retried: {reason}")


def _steps_in_all(trainer: Any) -> int | None:
    """The number of optimizer steps after which `fit` will end; None if it is unknown."""
    if trainer.train_dataloader is None or not trainer.lightning_module.automatic_optimization:
        # Lightning would load the data now; and with several optimizers, a batch makes several steps.
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < float("inf") else None


def _fault_report(env: Mapping[str, str]) -> FaultReport | None:
    text = env.get(environment.FAULT_REPORT)
    return FaultReport.from_json(text) if text else None


def _float(env: Mapping[str, str], name: str) -> float | None:
    value = env.get(name)
    return float(value) if value else None
