"""Recoveries in place on one node: what its workers have reported, which ranks are replaced, and who is notified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.console import CONSOLE, Bar
from lightning_ckptless.membership.agent.workers import Workers
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.channel.program_failure import without_numbers
from lightning_ckptless.membership.forkserver.client import ForkError, ForkServerLostError
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.standby import Standbys, promote
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping, Regroupings
from lightning_ckptless.protocol.hang_detection import Hang, Meeting, find_unreleased
from lightning_ckptless.protocol.messages import (
    CannotRecover,
    CreatedGroup,
    EnteredLoop,
    LeftLoop,
    Regroup,
    Regrouped,
    ReleasedGroups,
    StepCommitted,
    StuckCollective,
    WaitingAtLoop,
)
from lightning_ckptless.protocol.retry_policy import RecoveryLimits

_LINES_SHOWN = 40
Record = Callable[..., None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RequestedOptions:
    """What the user has requested, on the command line or through the strategy of the workers.

    Args:
        in_place: whether survivors may recover in place.
        standbys: processes that wait for a rank.
        preload_imports: whether new processes preload what the script imports.
        hang_timeout_s: silence in seconds after which lagging ranks are killed; None to learn it, 0 to disable.
        limits: how often the run may recover.
        fixed_world: why the workers cannot train with another world size; empty where they can.
    """

    in_place: bool = True
    standbys: int = 0
    preload_imports: bool = True
    hang_timeout_s: float | None = None
    limits: RecoveryLimits = field(default_factory=RecoveryLimits)
    fixed_world: str = ""


class InPlaceRecovery:
    """One agent's part in recoveries in place.

    Args:
        in_place: from the command line; None to leave it to the strategy of the workers.
        standbys: from the command line; None to leave it to the strategy.
        preload_imports: from the command line; None to leave it to the strategy.
        folder: for the output of standbys.
        outputs: folder for the output of new processes until they have joined the other ranks.
        record: receives events.
        say: shows a message to the user.

    Attributes:
        tries: recoveries in place since the last committed step in which the ranks have met. A meeting that another
            fault has interrupted is not counted: it says nothing about what would have followed.
        waiting_at_loop: local ranks that have reached the training loop and wait there for the other ranks.
        trains: whether a step was committed in this round.
        number: of the last regrouping that the workers were notified of.
    """

    def __init__(
        self,
        *,
        in_place: bool | None,
        standbys: int | None,
        preload_imports: bool | None,
        folder: Path,
        outputs: Path,
        record: Record,
        say: Say,
    ) -> None:
        self.tries = 0
        self.number = 0
        self.waiting_at_loop: set[int] = set()
        self.trains = False
        self._given = in_place, standbys, preload_imports
        self._requested: RequestedOptions | None = None
        self._folder = folder
        self._outputs = outputs
        self._output_of: dict[int, Path] = {}
        self._shown: dict[str, int] = {}
        self._record = record
        self._say = say
        self._obstacle: str | None = None
        self._lasting: str | None = None
        self._regroupings: Regroupings | None = None
        self._standbys: Standbys | None = None
        self._start_standby: Callable[[list[int]], Process] | None = None
        self._notified_at: dict[int, float] = {}
        self._held: dict[int, str] = {}
        self._ended_for_wait: set[int] = set()
        self._env_of: Callable[[int], dict[str, str]] | None = None
        self._coming: dict[int, float] = {}
        self._ready: dict[int, float] = {}
        self._created: dict[int, tuple[int, float]] = {}
        self._have_met: set[int] = set()
        self._met = 0
        self._startup_s = 0.0
        self._began_at = 0.0

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
            regroupings: of the round.
            start_standby: starts a process without a rank.
            env_of: environment variables that give a local rank its rank in this round, for workers that have stayed
                from the previous round; None where all workers were started together.
        """
        self.tries, self._obstacle, self.trains, self._env_of = 0, None, False, env_of
        self._met = 0
        if env_of is None:
            self.number = regroupings.number
        self._notified_at.clear()
        self._held.clear()
        self._ended_for_wait.clear()
        self._coming.clear()
        self._ready.clear()
        self._have_met.clear()
        self._created.clear()
        self._began_at = time.monotonic()
        self.waiting_at_loop.clear()
        self._regroupings = regroupings
        self._start_standby = start_standby

    def end_round(self) -> None:
        """End the round: its workers have exited, or are about to."""
        self._regroupings = None
        if self._standbys is not None:
            self._standbys.stop()
            self._standbys = None

    # ------------------------------------------------------------------ what is known

    @property
    def is_wanted(self) -> bool:
        """Whether survivors may recover in place."""
        allowed = self._given[0] if self._requested is None else self._requested.in_place
        return allowed is not False

    @property
    def obstacle_to_world_change(self) -> str:
        """Why this node's workers cannot train with another world size, in a worker's words; empty where they can."""
        if not self.is_wanted:
            return "recovery in place is switched off"
        return self.obstacle or ("" if self._requested is None else self._requested.fixed_world)

    @property
    def hang_timeout_s(self) -> float | None:
        """Silence in seconds after which lagging ranks are killed."""
        return None if self._requested is None else self._requested.hang_timeout_s

    @property
    def learns_imports(self) -> bool:
        """Whether new processes preload what the script imports."""
        return self._requested is not None and self._requested.preload_imports

    @property
    def limits(self) -> RecoveryLimits:
        """How often the run may recover, according to the strategy of the workers."""
        return RecoveryLimits() if self._requested is None else self._requested.limits

    def disable(self, reason: str) -> None:
        """Recover in place no more for the rest of the agent's life."""
        self._lasting = self._lasting or reason

    @property
    def obstacle(self) -> str | None:
        """Why a worker cannot recover in place, as it reported; None where none has."""
        unknown = None if self._requested is not None else "no worker has reached fit yet"
        return self._lasting or self._obstacle or unknown

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Take note of what workers have sent."""
        for rank, message, _ in received:
            match message:
                case EnteredLoop():
                    if self._coming.pop(rank, None) is None and self._env_of is None and not self.trains:
                        self._startup_s = max(self._startup_s, time.monotonic() - self._began_at)
                    self._output_of.pop(rank, None)
                    self._take_requested(message)
                case StepCommitted():
                    self.tries, self.trains = 0, True
                    self._ended_for_wait.clear()
                case WaitingAtLoop():
                    self.waiting_at_loop.add(rank)
                case ReleasedGroups():
                    self._notified_at.pop(rank, None)
                    self._ready[rank] = time.monotonic()
                case CreatedGroup() | Regrouped():
                    self._note_meeting(rank, message)
                case StuckCollective():
                    self._note_held(rank, message)
                case LeftLoop():
                    CONSOLE.bar = Bar.NONE
                case CannotRecover(reason, lasting):
                    self._obstacle = f"local rank {rank}: {reason}"
                    if lasting:
                        self._lasting = self._obstacle

    def _note_meeting(self, rank: int, message: CreatedGroup | Regrouped) -> None:
        is_current = self._regroupings is not None and message.number == self._regroupings.number
        if isinstance(message, CreatedGroup):
            if is_current:
                self._created[rank] = message.created, time.monotonic()
            return
        if message.number > self._met:
            self.tries, self._met = self.tries + 1, message.number
        if is_current:
            self._ready.pop(rank, None)
            self._have_met.add(rank)

    def _note_held(self, rank: int, message: StuckCollective) -> None:
        """Note that a worker reports a stuck collective, unless it was killed for one before and that did not help."""
        believed = rank not in self._ended_for_wait
        if believed:
            self._held[rank] = message.reason
        self._record("stuck_collective", local_rank=rank, believed=believed, **asdict(message))

    def meeting(self, workers: Workers) -> Meeting:
        """Return how far this node's workers have met the other ranks."""
        running = workers.running_ranks
        return Meeting(
            coming={rank: at for rank, at in self._coming.items() if rank in running},
            ready={rank: at for rank, at in self._ready.items() if rank in running},
            created={rank: created for rank, created in self._created.items() if rank in running},
            met=self._have_met,
            startup_s=self._startup_s,
            is_whole=self._regroupings is not None and not self._regroupings.is_shared,
        )

    def _take_requested(self, message: EnteredLoop) -> None:
        in_place, standbys, preload_imports = self._given
        CONSOLE.bar = Bar(message.bar)
        self._requested = RequestedOptions(
            in_place=message.in_place if in_place is None else in_place,
            standbys=message.standbys if standbys is None else standbys,
            preload_imports=message.preload_imports if preload_imports is None else preload_imports,
            hang_timeout_s=message.hang_timeout_s,
            limits=RecoveryLimits(message.max_recoveries_without_progress, message.max_recoveries_per_hour),
            fixed_world=message.fixed_world,
        )
        self._lasting = message.obstacle or self._lasting

    def poll(self) -> Hang | None:
        """Find survivors that do not release their process groups; one at a time where they report it themselves."""
        found = find_unreleased(
            self._notified_at, now=time.monotonic(), override_s=self.hang_timeout_s, held=self._held
        )
        if found is not None:
            self._ended_for_wait.update(self._held.keys() & set(found.ranks))
        return found

    def maintain_standbys(self) -> None:
        """Keep the requested number of standbys once training is under way."""
        wanted = self._requested.standbys if self._requested is not None and self.is_wanted else 0
        if not wanted or not self.trains or self.obstacle is not None or self._start_standby is None:
            return
        if self._standbys is None:
            self._standbys = Standbys(wanted, self._start_standby, self._folder, self._say)
        try:
            has_changed = self._standbys.maintain()
        except ForkServerLostError:
            # All workers have died with it, which is detected next.
            return
        except ForkError as error:
            self._say(f"continuing without standbys: {error}")
            self._requested = None if self._requested is None else replace(self._requested, standbys=0)
            return
        if has_changed:
            self._record("standbys", ready=self._standbys.ready, wanted=wanted, pids=list(self._standbys.pids))

    # ------------------------------------------------------------------ recovering

    def show_output_of(self, rank: int) -> None:
        """Show the output of a lost local rank that was a new process and had not joined the other ranks yet."""
        path = self._output_of.pop(rank, None)
        if path is None or not path.exists():
            return
        lines = path.read_text(errors="replace").splitlines()[-_LINES_SHOWN:]
        outline = without_numbers("\n".join(lines))
        self._shown[outline] = count = self._shown.get(outline, 0) + 1
        what = "a new process failed before it joined the other ranks"
        if count > 1:
            self._say(f"{what}; its output, in {path}, is the same as above, {count} times so far")
        else:
            self._say("\n  ".join([f"{what}; its output, in {path}:", *lines]))

    def open(self, fault: FaultReport) -> Regrouping:
        """Open a regrouping for a fault of this node."""
        assert self._regroupings is not None, "a round has begun"
        return self._regroupings.open(fault)

    def regroup(self, workers: Workers, number: int, fault: FaultReport) -> None:
        """Notify this node's workers of another world."""
        self._notify(workers, Regrouping(number, fault), leave=frozenset())

    def follow(self, workers: Workers) -> None:
        """Forward to this node's workers the regrouping that another node's agent has opened."""
        if self._regroupings is not None and (news := self._regroupings.news()) is not None:
            self._notify(workers, news, leave=frozenset())

    def _notify(self, workers: Workers, regrouping: Regrouping, leave: frozenset[int]) -> None:
        self.number = regrouping.number
        notified = tuple(rank for rank in workers.running_ranks if rank not in leave)
        for rank in notified:
            env = self._env_of(rank) if self._env_of is not None else {}
            workers.send_to(rank, Regroup(regrouping.number, asdict(regrouping.fault), env))
        for rank in leave:
            self._notified_at.pop(rank, None)
        self._held.clear()
        self._ready.clear()
        self._have_met.clear()
        self._created.clear()
        # Ranks on their way to `fit` have nothing to release, and may take their time.
        self._coming |= dict.fromkeys(leave, time.monotonic())
        self._notified_at |= dict.fromkeys((rank for rank in notified if rank not in self._coming), time.monotonic())

    def replace(
        self, workers: Workers, lost: list[int], regrouping: Regrouping, env_of: Callable[[int], dict[str, str]]
    ) -> dict[int, str]:
        """Notify the survivors, and start replacements for the lost ranks.

        Args:
            workers: of this node.
            lost: local ranks.
            regrouping: in which all ranks meet.
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
                    self._obstacle = str(error)
            else:
                self._output_of[rank] = self._standbys.output_of(standby)
                _promote(workers, rank, standby, env, regrouping)
            how[rank] = "new process" if standby is None else "standby"
        return how


def joining(regrouping: Regrouping) -> dict[str, str]:
    """Return the environment variables that tell a new process to meet survivors."""
    return {
        environment.REGROUPING: str(regrouping.number),
        environment.FAULT_REPORT: regrouping.fault.to_json(),
    }


def _promote(workers: Workers, rank: int, standby: Process, env: dict[str, str], regrouping: Regrouping) -> None:
    stdio = workers.open_stdio(rank)
    try:
        promote(standby, env | joining(regrouping), regrouping, stdio[1:])
    finally:
        for number in stdio:
            if number > 2:
                os.close(number)
    workers.put_in_place(rank, standby)
