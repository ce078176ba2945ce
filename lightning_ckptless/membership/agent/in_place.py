"""Recoveries in place on one node: what its workers report, which ranks are replaced, and who is notified."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.channel.program_failure import without_numbers
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import (
    ReplacementFailed,
    Report,
    StandbysChanged,
    StandbysRefused,
    StuckCollectiveReported,
)
from lightning_ckptless.membership.forkserver.client import ForkError, ForkServerLostError
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.standby import Standbys
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping, Regroupings
from lightning_ckptless.protocol.hang_detection import Hang, RegroupStatus, find_unreleased
from lightning_ckptless.protocol.messages import (
    CannotRecover,
    CreatedGroup,
    EnteredLoop,
    Message,
    Regroup,
    Regrouped,
    ReleasedGroups,
    StepCommitted,
    StuckCollective,
    WaitingAtLoop,
)
from lightning_ckptless.protocol.retry_policy import RecoveryLimits
from lightning_ckptless.protocol.stragglers import StragglerOptions

_LINES_SHOWN = 40


@dataclass(frozen=True, slots=True)
class RequestedOptions:
    """The user's settings, from the command line or from the strategy of the workers.

    Args:
        in_place: whether survivors may recover in place.
        standbys: processes that wait for a rank.
        preload_imports: whether new processes preload what the script imports.
        hang_timeout_s: silence in seconds after which lagging ranks are killed; None to learn it, 0 to disable.
        limits: how often the run may recover.
        fixed_world: why the workers cannot train with another world size; empty if they can.
        stragglers: how stragglers are handled.
    """

    in_place: bool = True
    standbys: int = 0
    preload_imports: bool = True
    hang_timeout_s: float | None = None
    limits: RecoveryLimits = field(default_factory=RecoveryLimits)
    fixed_world: str = ""
    stragglers: StragglerOptions = field(default_factory=StragglerOptions)


class WorkerControl(Protocol):
    """What a recovery in place needs of this node's workers; see `WorkerGroup`."""

    @property
    def running_ranks(self) -> tuple[int, ...]:
        """Local ranks whose processes are running."""

    @property
    def inside(self) -> Collection[int]:
        """Local ranks that are in the training loop, or on their way back to it."""

    def send_to(self, rank: int, message: Message) -> None:
        """Send a message to one running local rank."""

    def replace(self, rank: int, env: Mapping[str, str]) -> None:
        """Start a new worker in the place of a lost one."""

    def promote(self, rank: int, standby: Process, env: Mapping[str, str], regrouping: Regrouping) -> None:
        """Let a standby take the place of a lost worker."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One round of the rendezvous.

    Args:
        regroupings: regroupings of the round.
        start_standby: starts a process without a rank.
        env_of: environment variables that give a local rank its rank in this round, for workers that have stayed from
            the previous round; None if all workers were started together.
    """

    regroupings: Regroupings
    start_standby: Callable[[list[int]], Process]
    env_of: Callable[[int], dict[str, str]] | None


@dataclass(slots=True)
class _Progress:
    """What this node's workers have reported in one round; all ranks are local.

    Args:
        began_at: when the round began.
        began_with: number of the regrouping that it began with.
        tries: completed regroups since the last committed step. One that was interrupted by another fault is not
        counted, since its outcome is unknown.
        trains: whether a step was committed.
        obstacle: why a worker cannot recover in place; None if none has reported that.
        completed: number of the last completed regrouping.
        waiting_at_loop: ranks that have reached the training loop and wait there for the other ranks.
        notified_at: when ranks that have yet to release their process groups were notified.
        coming: since when new processes are on their way to `fit`.
        joining: first processes of a node that were notified before they reached `fit`. There is no limit for them, as
        if all ranks started together.
        ready: since when ranks have been waiting for the others.
        created: how many process groups ranks have created in the last regrouping, and since when.
        regrouped: ranks that have completed the last regrouping.
        held: why ranks cannot release their process groups, as they report.
        killed_for_wait: ranks that were killed for that.
        sole_shards: shards that no other node has a copy of.
    """

    began_at: float = 0.0
    began_with: int = 0
    tries: int = 0
    trains: bool = False
    obstacle: str | None = None
    completed: int = 0
    waiting_at_loop: set[int] = field(default_factory=set)
    notified_at: dict[int, float] = field(default_factory=dict)
    coming: dict[int, float] = field(default_factory=dict)
    joining: set[int] = field(default_factory=set)
    ready: dict[int, float] = field(default_factory=dict)
    created: dict[int, tuple[int, float]] = field(default_factory=dict)
    regrouped: set[int] = field(default_factory=set)
    held: dict[int, str] = field(default_factory=dict)
    killed_for_wait: set[int] = field(default_factory=set)
    sole_shards: list[int] = field(default_factory=list)


class InPlaceRecovery:
    """One agent's part in recoveries in place.

    Args:
        in_place: from the command line; None to leave it to the strategy of the workers.
        standbys: from the command line; None to leave it to the strategy.
        preload_imports: from the command line; None to leave it to the strategy.
        folder: folder for the output of standbys.
        outputs: folder for the output of new processes until they have joined the other ranks.
        report: receives events.
        clock: this node's clock.

    Attributes:
        number: number of the last regrouping that the workers were notified of.
        wanted_for_drains: standbys needed to drain ranks, in addition to those requested.
    """

    def __init__(
        self,
        *,
        in_place: bool | None,
        standbys: int | None,
        preload_imports: bool | None,
        folder: Path,
        outputs: Path,
        report: Report,
        clock: Clock,
    ) -> None:
        self.number = 0
        self.wanted_for_drains = 0
        self._refusal = ""
        self._given = in_place, standbys, preload_imports
        self._requested: RequestedOptions | None = None
        self._folder = folder
        self._outputs = outputs
        self._output_of: dict[int, Path] = {}
        self._shown: dict[str, int] = {}
        self._report = report
        self._clock = clock
        self._lasting: str | None = None
        self._round: _Round | None = None
        self._progress = _Progress()
        self._standbys: Standbys | None = None
        self._startup_s = 0.0

    # ------------------------------------------------------------------ rounds

    def begin_round(
        self,
        regroupings: Regroupings,
        start_standby: Callable[[list[int]], Process],
        *,
        env_of: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        """Begin a round of the rendezvous.

        Args:
            regroupings: regroupings of the round.
            start_standby: starts a process without a rank.
            env_of: environment variables that give a local rank its rank in this round, for workers that have stayed
                from the previous round; None if all workers were started together.
        """
        if env_of is None:
            self.number = regroupings.number
        self._round = _Round(regroupings, start_standby, env_of)
        self._progress = _Progress(began_at=self._clock.monotonic(), began_with=self.number)

    def end_round(self) -> None:
        """End the round: its workers have exited, or are about to."""
        self._round = None
        if self._standbys is not None:
            self._standbys.stop()
            self._standbys = None

    # ------------------------------------------------------------------ what is known

    @property
    def tries(self) -> int:
        """Recoveries in place since the last committed step, counting those whose ranks have regrouped."""
        return self._progress.tries

    @property
    def is_regrouping(self) -> bool:
        """Whether the workers were notified of a regrouping that none of them has completed."""
        return self.number > max(self._progress.began_with, self._progress.completed)

    @property
    def completed(self) -> int:
        """Number of the last regrouping that a worker has completed in this round; 0 for none."""
        return self._progress.completed

    @property
    def awaits_replacement(self) -> bool:
        """Whether a new process is on its way to the training loop, in the place of a lost one."""
        return bool(self._progress.coming)

    @property
    def trains(self) -> bool:
        """Whether a step was committed in this round."""
        return self._progress.trains

    @property
    def sole_shards(self) -> list[int]:
        """The shards that no other node has a copy of."""
        return self._progress.sole_shards

    @property
    def waiting_at_loop(self) -> frozenset[int]:
        """Local ranks that have reached the training loop and wait there for the other ranks."""
        return frozenset(self._progress.waiting_at_loop)

    @property
    def is_wanted(self) -> bool:
        """Whether survivors may recover in place."""
        allowed = self._given[0] if self._requested is None else self._requested.in_place
        return allowed is not False

    @property
    def obstacle_to_world_change(self) -> str:
        """Why this node's workers cannot train with another world size, as one of them reported; empty if they can."""
        if not self.is_wanted:
            return "recovery in place is disabled"
        return self.obstacle or ("" if self._requested is None else self._requested.fixed_world)

    @property
    def hang_timeout_s(self) -> float | None:
        """Silence in seconds after which lagging ranks are killed."""
        return None if self._requested is None else self._requested.hang_timeout_s

    @property
    def stragglers(self) -> StragglerOptions:
        """How stragglers are handled."""
        return StragglerOptions() if self._requested is None else self._requested.stragglers

    @property
    def learns_imports(self) -> bool:
        """Whether new processes preload what the script imports."""
        return self._requested is not None and self._requested.preload_imports

    @property
    def limits(self) -> RecoveryLimits:
        """How often the run may recover, according to the strategy of the workers."""
        return RecoveryLimits() if self._requested is None else self._requested.limits

    def disable(self, reason: str) -> None:
        """Disable recovery in place for the rest of the agent's life."""
        self._lasting = self._lasting or reason

    @property
    def obstacle(self) -> str | None:
        """Why a worker cannot recover in place, as it reported; None if none has."""
        unknown = None if self._requested is not None else "no worker has reached fit yet"
        return self._lasting or self._progress.obstacle or unknown

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Process messages from workers."""
        progress = self._progress
        for rank, message, _ in received:
            match message:
                case EnteredLoop():
                    self._note_entered(rank)
                    self._take_requested(message)
                case StepCommitted(sole_shards):
                    progress.tries, progress.trains, progress.sole_shards = 0, True, sole_shards
                    progress.killed_for_wait.clear()
                case WaitingAtLoop():
                    progress.waiting_at_loop.add(rank)
                    progress.notified_at.pop(rank, None)
                case ReleasedGroups():
                    progress.notified_at.pop(rank, None)
                    progress.ready[rank] = self._clock.monotonic()
                case CreatedGroup() | Regrouped():
                    self._note_regroup(rank, message)
                case StuckCollective():
                    self._note_held(rank, message)
                case CannotRecover(reason, lasting):
                    progress.obstacle = f"local rank {rank}: {reason}"
                    if lasting:
                        self._lasting = progress.obstacle

    def _note_entered(self, rank: int) -> None:
        progress, starts_together = self._progress, self._round is not None and self._round.env_of is None
        if progress.coming.pop(rank, None) is not None or rank in progress.joining:
            progress.joining.discard(rank)
            # Its next message is one that survivors also send. Until then it is watched like a survivor.
            progress.notified_at[rank] = self._clock.monotonic()
        elif starts_together and not progress.trains:
            self._startup_s = max(self._startup_s, self._clock.monotonic() - progress.began_at)
        self._output_of.pop(rank, None)

    def _note_regroup(self, rank: int, message: CreatedGroup | Regrouped) -> None:
        progress = self._progress
        is_current = self._round is not None and message.number == self._round.regroupings.number
        if isinstance(message, CreatedGroup):
            if is_current:
                progress.created[rank] = message.created, self._clock.monotonic()
            return
        if message.number > progress.completed:
            progress.tries, progress.completed = progress.tries + 1, message.number
        if is_current:
            progress.ready.pop(rank, None)
            progress.regrouped.add(rank)

    def _note_held(self, rank: int, message: StuckCollective) -> None:
        """Record a reported stuck collective, unless the rank was already killed for one and that did not help."""
        believed = rank not in self._progress.killed_for_wait
        if believed:
            self._progress.held[rank] = message.reason
        self._report(StuckCollectiveReported(rank, believed, message))

    def regroup_status(self, workers: WorkerControl) -> RegroupStatus:
        """Return how far this node's workers have regrouped with the other ranks."""
        running, progress = workers.running_ranks, self._progress
        return RegroupStatus(
            coming={rank: at for rank, at in progress.coming.items() if rank in running},
            unreleased={rank: at for rank, at in progress.notified_at.items() if rank in running},
            ready={rank: at for rank, at in progress.ready.items() if rank in running},
            created={rank: created for rank, created in progress.created.items() if rank in running},
            regrouped=progress.regrouped,
            startup_s=self._startup_s,
            is_whole=self._round is not None and not self._round.regroupings.is_shared,
        )

    def _take_requested(self, message: EnteredLoop) -> None:
        in_place, standbys, preload_imports = self._given
        self._requested = RequestedOptions(
            in_place=message.in_place if in_place is None else in_place,
            standbys=message.standbys if standbys is None else standbys,
            preload_imports=message.preload_imports if preload_imports is None else preload_imports,
            hang_timeout_s=message.hang_timeout_s,
            limits=RecoveryLimits(message.max_recoveries_without_progress, message.max_recoveries_per_hour),
            fixed_world=message.fixed_world,
            stragglers=StragglerOptions(message.straggler_factor, message.drain_stragglers_after_s),
        )
        self._lasting = message.obstacle or self._lasting

    def poll(self) -> Hang | None:
        """Find survivors that do not release their process groups; one at a time if they report it themselves."""
        progress = self._progress
        found = find_unreleased(
            progress.notified_at, now=self._clock.monotonic(), override_s=self.hang_timeout_s, held=progress.held
        )
        if found is not None:
            progress.killed_for_wait.update(progress.held.keys() & set(found.ranks))
        return found

    @property
    def ready_standbys(self) -> int:
        """Number of standbys that wait for a rank."""
        return 0 if self._standbys is None else self._standbys.ready

    @property
    def why_no_standby(self) -> str:
        """Why no standby will become ready; empty if one may."""
        if self.ready_standbys:
            return ""
        if self._standbys is not None and self._standbys.have_given_up:
            return "standbys have exited before they were ready; the agent's output shows the last one's"
        return self._refusal or self.obstacle or ""

    @property
    def _wanted_standbys(self) -> int:
        if self._requested is None or not self.is_wanted:
            return 0
        return self._requested.standbys + self.wanted_for_drains

    def maintain_standbys(self) -> None:
        """Keep the requested number of standbys once training is under way."""
        wanted = self._wanted_standbys
        if not wanted or not self.trains or self.obstacle is not None or self._round is None:
            return
        if self._standbys is None:
            self._standbys = Standbys(wanted, self._round.start_standby, self._folder, self._report)
        self._standbys.count = wanted
        try:
            has_changed = self._standbys.maintain()
        except ForkServerLostError:
            # All workers died with it, which is detected next.
            return
        except ForkError as error:
            self._report(StandbysRefused(error))
            self._refusal = str(error)
            self._requested = None if self._requested is None else replace(self._requested, standbys=0)
            return
        if has_changed:
            self._report(StandbysChanged(self._standbys.ready, wanted, list(self._standbys.pids)))

    # ------------------------------------------------------------------ recovering

    def show_output_of(self, rank: int) -> None:
        """Show the output of a lost local rank that was a new process and had not yet joined the other ranks."""
        path = self._output_of.pop(rank, None)
        if path is None or not path.exists():
            return
        lines = path.read_text(errors="replace").splitlines()[-_LINES_SHOWN:]
        outline = without_numbers("\n".join(lines))
        self._shown[outline] = count = self._shown.get(outline, 0) + 1
        self._report(ReplacementFailed(path, lines, count))

    def open(self, fault: FaultReport) -> Regrouping:
        """Open a regrouping for a fault of this node."""
        assert self._round is not None, "a round has begun"
        return self._round.regroupings.open(fault)

    def regroup(self, workers: WorkerControl, number: int, fault: FaultReport) -> None:
        """Notify this node's workers of a world change, unless a later fault has superseded it."""
        if number > self.number:
            self._notify(workers, Regrouping(number, fault), leave=frozenset())

    def follow(self, workers: WorkerControl) -> None:
        """Forward to this node's workers the regrouping that another node's agent has opened."""
        if self._round is not None and (news := self._round.regroupings.news()) is not None:
            self._notify(workers, news, leave=frozenset())

    def _notify(self, workers: WorkerControl, regrouping: Regrouping, leave: frozenset[int]) -> None:
        progress, env_of = self._progress, None if self._round is None else self._round.env_of
        self.number = regrouping.number
        notified = tuple(rank for rank in workers.running_ranks if rank not in leave)
        for rank in notified:
            env = env_of(rank) if env_of is not None else {}
            workers.send_to(rank, Regroup(regrouping.number, asdict(regrouping.fault), env))
        for rank in leave:
            progress.notified_at.pop(rank, None)
        progress.held.clear()
        progress.ready.clear()
        progress.regrouped.clear()
        progress.created.clear()
        now = self._clock.monotonic()
        # Ranks on their way to `fit` have nothing to release, and no limit applies to them.
        progress.coming |= dict.fromkeys(leave, now)
        progress.joining = {rank for rank in notified if rank not in workers.inside}
        holding = (rank for rank in notified if rank not in progress.coming and rank not in progress.joining)
        progress.notified_at |= dict.fromkeys(holding, now)

    def replace(
        self,
        workers: WorkerControl,
        lost: Sequence[int],
        regrouping: Regrouping,
        env_of: Callable[[int], dict[str, str]],
    ) -> dict[int, str]:
        """Notify the survivors, and start replacements for the lost ranks.

        Args:
            workers: this node's workers.
            lost: local ranks.
            regrouping: regrouping that all ranks join.
            env_of: environment variables that make a process a local rank.

        Returns:
            What replaces each local rank: `standby` or `new process`.
        """
        self._notify(workers, regrouping, leave=frozenset(lost))
        how = {}
        for rank in lost:
            env = env_of(rank)
            standby = self._standbys.take() if self._standbys is not None else None
            if self._standbys is None or standby is None:
                output = self._outputs / f"rank{env['RANK']}-{regrouping.number}.log"
                self._output_of[rank] = output
                try:
                    workers.replace(rank, env | joining(regrouping) | {environment.OUTPUT_FILE: str(output)})
                except ForkError as error:
                    self._progress.obstacle = str(error)
            else:
                self._output_of[rank] = self._standbys.output_of(standby)
                workers.promote(rank, standby, env | joining(regrouping), regrouping)
            how[rank] = "new process" if standby is None else "standby"
        return how


def joining(regrouping: Regrouping) -> dict[str, str]:
    """Return the environment variables that make a new process join the survivors."""
    return {
        environment.REGROUPING: str(regrouping.number),
        environment.FAULT_REPORT: regrouping.fault.to_json(),
    }
