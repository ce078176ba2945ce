"""The worker processes of one agent: their starts, messages, exits and replacements."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lightning_ckptless import environment
from lightning_ckptless.membership.agent.process_control import ProcessControl
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.forkserver.client import End, ForkError, ForkServerLostError
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.standby import promote
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.crash_loop import Stage
from lightning_ckptless.protocol.messages import (
    AskToLeave,
    CannotRecover,
    EnteredLoop,
    Finish,
    FitReturned,
    HandedOver,
    LeftLoop,
    MayLeave,
    Message,
    ReachedFit,
    ReachedTrainer,
    ReleasedGroups,
)
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded

_CLOCK = Clock()
_KILL_WAIT_S = 60.0
_POLL_EVERY_S = 0.005
"""Pause between two checks for dying workers: the kernel reports an exit only once it has freed the memory."""
_DYING_GRACE_S = 0.025
"""Longest wait for the exit of a dying worker. On a machine without a free core, its memory should be freed before the
other ranks regroup. The cause of death is known before."""

_HANDED_OVER_GRACE_S = 1.0
"""Longest wait for the exit of a worker that hands its rank over: its successor may need what its exit frees."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A worker that has completed its last step and asks whether it may leave the training loop.

    Args:
        number: number of the regrouping that it belongs to.
        at: its last step.
    """

    number: int
    at: AtEnd


class WorkerGroup:
    """Worker processes forked from a fork server.

    Args:
        control: starts the processes, and waits for them.
        jobs: what each local rank runs.
        stdouts: file for the output of each local rank; empty for this process's own.
        stderrs: file for the error output of each local rank; empty for this process's own.
        first_wait_s: time in seconds for which the start of the others waits until the first worker reaches its
            trainer, with the run folder that Hydra made for it; 0 to start all at once.
        clock: this node's clock.

    Attributes:
        inside: local ranks that are in the training loop, or on their way back to it.
        stages: where each local rank is in its script.
        at_end: those in the loop that have completed their last step and ask whether they may leave.
        ending: those that may.
        handed_over: those that exit to hand their rank over.
        gave_up: those that exit because they cannot recover in place.
    """

    def __init__(
        self,
        control: ProcessControl,
        jobs: Mapping[int, Job],
        *,
        stdouts: Mapping[int, str],
        stderrs: Mapping[int, str],
        first_wait_s: float = 0.0,
        clock: Clock = _CLOCK,
    ) -> None:
        self.inside: set[int] = set()
        self.stages: dict[int, Stage] = dict.fromkeys(jobs, Stage.BEFORE)
        self.at_end: dict[int, Ending] = {}
        self.ending: set[int] = set()
        self.handed_over: dict[int, HandedOver] = {}
        self.gave_up: set[int] = set()
        self._control = control
        self._clock = clock
        self._jobs = dict(jobs)
        self._stdouts = stdouts
        self._stderrs = stderrs
        self._processes: dict[int, Process] = {}
        self._running: set[int] = set()
        self._leaving: list[Process] = []
        self._ends: dict[int, End] = {}
        self._first_signs: dict[int, float] = {}
        self._stopped: set[int] = set()
        self._hang_reasons: dict[int, str] = {}
        self._received: list[FromWorker] = []
        self._first_wait_s = first_wait_s

    # ------------------------------------------------------------------ starting

    def start(self) -> None:
        """Start all workers."""
        first, *others = self._jobs
        self._launch(first, self._jobs[first], os.O_TRUNC)
        folder = self._folder_of(first) if others else ""
        for rank in others:
            self._launch(rank, self.job(rank, {environment.HYDRA: folder} if folder else {}), os.O_TRUNC)

    def _folder_of(self, first: int) -> str:
        """Return the run folder that the first worker reports at its trainer; empty if it reports none in time."""
        deadline = self._clock.monotonic() + self._first_wait_s
        while first in self._running and (left_s := deadline - self._clock.monotonic()) > 0:
            self._wait(left_s, for_messages=True)
            self._listen()
            for received in self._received:
                if isinstance(received.message, ReachedTrainer):
                    return received.message.hydra
        return ""

    def _launch(self, rank: int, job: Job, mode: int) -> None:
        stdio = self._open_stdio(rank, mode)
        try:
            self._processes[rank] = self._control.start(job, stdio)
        finally:
            _close_files(stdio)
        self._running.add(rank)

    def _open_stdio(self, rank: int, mode: int) -> list[int]:
        """Open stdin, stdout and stderr of a rank: its log files, or this process's own."""
        files = [0]
        for number, path in ((1, self._stdouts[rank]), (2, self._stderrs[rank])):
            files.append(os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o644) if path else number)
        return files

    def job(self, rank: int, env: Mapping[str, str]) -> Job:
        """Return what a new worker of a rank runs, with additional environment variables."""
        job = self._jobs[rank]
        return replace(job, env={**job.env, **env})

    def replace(self, rank: int, env: Mapping[str, str]) -> None:
        """Start a new worker in place of a lost one; if that fails, the new one counts as lost.

        Raises:
            ForkError: the system allows no further process.
        """
        self._discard(rank)
        try:
            self._launch(rank, self.job(rank, env), os.O_APPEND)
        except ForkServerLostError:
            self._ends[rank] = End(-signal.SIGKILL, self._clock.wall())
        except ForkError:
            self._ends[rank] = End(-signal.SIGKILL, self._clock.wall())
            raise

    def promote(self, rank: int, standby: Process, env: Mapping[str, str], regrouping: Regrouping) -> None:
        """Give a standby the rank of a lost worker.

        Args:
            rank: local rank of the lost worker.
            standby: the process.
            env: environment variables that give it the rank.
            regrouping: regrouping in which it joins the other ranks.
        """
        stdio = self._open_stdio(rank, os.O_APPEND)
        try:
            promote(standby, dict(env), regrouping, stdio[1:])
        finally:
            _close_files(stdio)
        self._discard(rank)
        self._processes[rank] = standby
        self._running.add(rank)

    def _discard(self, rank: int) -> None:
        lost = self._processes[rank]
        lost.channel.close()
        if rank in self._running:
            # The old one is dying or stuck: its memory is freed while the new one starts.
            lost.signal(signal.SIGKILL)
            self._running.remove(rank)
            self._leaving.append(lost)
        self._ends.pop(rank, None)
        self._first_signs.pop(rank, None)
        self._hang_reasons.pop(rank, None)
        self.gave_up.discard(rank)
        self.inside.add(rank)
        self.stages[rank] = Stage.BEFORE
        self._reset_end(rank)

    def _reset_end(self, rank: int) -> None:
        self.at_end.pop(rank, None)
        self.ending.discard(rank)
        self.handed_over.pop(rank, None)

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    @property
    def running(self) -> int:
        """Number of workers that have not been seen to exit."""
        return len(self._running)

    # ------------------------------------------------------------------ the channels

    def send(self, message: Message) -> None:
        """Send a message to all workers that run."""
        for rank in self.running_ranks:
            self.send_to(rank, message)

    @property
    def running_ranks(self) -> tuple[int, ...]:
        """Local ranks whose processes run."""
        return tuple(sorted(self._running))

    def send_to(self, rank: int, message: Message) -> None:
        """Send a message to one running local rank."""
        self._processes[rank].channel.send(message)

    def signal_one(self, rank: int, number: int) -> None:
        """Send a signal to the process of a local rank, but not to the processes it has started."""
        self._processes[rank].signal(number, alone=True)

    def receive(self) -> list[FromWorker]:
        """Return the messages that workers have sent since the last call."""
        self._listen()
        received, self._received = self._received, []
        return received

    def _listen(self) -> None:
        # Including workers that have exited: a worker's last message tells why.
        for rank, process in self._processes.items():
            for message, files in process.channel.poll():
                self._received.append(FromWorker(rank, message, files))
                self._track(rank, message)

    def _track(self, rank: int, message: Message) -> None:
        """Record where a worker is in its script."""
        match message:
            case EnteredLoop():
                self.inside.add(rank)
                self._reset_end(rank)
            case AskToLeave(number, step, why):
                self.at_end[rank] = Ending(number, AtEnd(step, WhyEnded(why)))
            case ReleasedGroups():
                self._reset_end(rank)
            case LeftLoop():
                self.inside.discard(rank)
            case HandedOver():
                self.handed_over[rank] = message
            case CannotRecover(_, lasting) if not lasting:
                self.gave_up.add(rank)
            case ReachedFit():
                self.stages[rank] = Stage.INSIDE
            case FitReturned():
                self.stages[rank] = Stage.PAST

    def allow_leave(self) -> None:
        """Tell workers that ask to leave the training loop that they may."""
        for rank, ending in self.at_end.items():
            if rank in self._running:
                self.send_to(rank, MayLeave(ending.number))
        self.ending.update(self.at_end)
        self.at_end.clear()

    @property
    def all_train(self) -> bool:
        """Whether all workers run, are in the training loop and have not been allowed to leave it."""
        return bool(self._running) and self._running == self._processes.keys() == self.inside - self.ending

    @property
    def all_at_end(self) -> bool:
        """Whether every worker in the training loop has completed its last step."""
        return bool(self.at_end) and self.inside <= self.at_end.keys() | self.ending

    @property
    def past_loop(self) -> tuple[int, ...]:
        """Local ranks that have left the training loop, and have not entered that of another fit."""
        left = (rank for rank in self._processes if rank in self.ending or self.stages[rank] is Stage.PAST)
        return tuple(sorted(rank for rank in left if rank not in self.inside))

    @property
    def are_done(self) -> bool:
        """Whether a worker has completed its last step, and has not entered the training loop of another fit."""
        return bool(self.at_end or self.ending or self.past_loop) or not self._running

    # ------------------------------------------------------------------ exits

    def watch(self, timeout_s: float) -> None:
        """Wait until a worker exits, begins to die or sends a message, for at most `timeout_s` seconds."""
        deadline = self._clock.monotonic() + timeout_s
        while True:
            pause_s = min(_POLL_EVERY_S, max(0.0, deadline - self._clock.monotonic()))
            if self._wait(pause_s, for_messages=True) or self._clock.monotonic() >= deadline:
                return

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until a further worker exits, for at most `timeout_s` seconds. Returns whether one did."""
        if not self._running:
            return False
        before = len(self._running)
        self._wait(timeout_s, for_messages=False)
        return len(self._running) < before

    def _wait(self, timeout_s: float, *, for_messages: bool) -> bool:
        """Poll processes and channels once; returns whether something has happened."""
        running = {rank: self._processes[rank] for rank in self._running}
        ended, has_news = self._control.wait(running, timeout_s, for_messages=for_messages)
        for rank in ended:
            self._record_end(rank)
        self._leaving = [process for process in self._leaving if not process.has_ended()]
        dying = [rank for rank in self._running if self._processes[rank].is_dying()]
        for rank in dying:
            self._first_signs.setdefault(rank, self._clock.wall())
        return has_news or bool(dying)

    def _record_end(self, rank: int) -> None:
        process = self._processes[rank]
        self._running.remove(rank)
        end = process.end()
        # The culprit is the worker that starts to die first, not the one whose memory is freed first.
        self._ends[rank] = replace(end, at=min(end.at, self._first_signs.pop(rank, end.at)))

    def signs(self) -> dict[int, float]:
        """When the failure of each failed worker was first seen, by local rank: its exit, or the first sign of it."""
        return {rank: end.at for rank, end in self.failed().items()} | self._first_signs

    def kill_hung(self, ranks: Collection[int], reason: str, since: float) -> None:
        """Kill workers that hang; their exits count as their own failures.

        Args:
            ranks: local ranks.
            reason: why they are considered hung.
            since: wall clock of the last progress of any worker.
        """
        self._first_signs.update(dict.fromkeys(ranks, since))
        self._hang_reasons.update(dict.fromkeys(ranks, reason))
        for rank in ranks:
            self._processes[rank].signal(signal.SIGKILL)

    def hang_reason(self, rank: int) -> str:
        """Why a worker was killed as hung; empty if it was not."""
        return self._hang_reasons.get(rank, "")

    def lost(self) -> dict[int, End | None]:
        """Return workers that failed by themselves, by local rank, in the order of their deaths.

        Exit code 0 is a failure for a worker in the training loop. None means that the worker is dying and its exit is
        not known yet.
        """
        # A worker that has left the loop may exit as it likes, and take its time. Workers killed as hung are lost at
        # once and together, even one that the kernel does not release yet. So are those that hand their ranks over.
        dying = [
            rank
            for rank in self._running
            if rank in self._hang_reasons
            or rank in self.handed_over
            or (rank in self.inside and self._processes[rank].is_dying())
        ]
        for rank in dying:
            self._first_signs.setdefault(rank, self._clock.wall())
        grace_s = _HANDED_OVER_GRACE_S if self.handed_over.keys() & set(dying) else _DYING_GRACE_S
        deadline = self._clock.monotonic() + grace_s
        while self._running.intersection(dying) and (left_s := deadline - self._clock.monotonic()) > 0:
            self.wait_for_end(left_s)
        self._listen()
        ends = {**self._reported_ends(dying), **self.failed()}
        signs = {rank: self._first_signs[rank] for rank in self._running.intersection(dying)}
        signs |= {rank: end.at for rank, end in ends.items()}
        return {rank: ends.get(rank) for rank in sorted(signs, key=lambda rank: signs[rank])}

    def _reported_ends(self, dying: Collection[int]) -> dict[int, End]:
        """Return the exits of workers that have yet to free their memory, as the kernel reports them, by local rank."""
        codes = {rank: self._processes[rank].exit_code() for rank in self._running.intersection(dying)}
        return {rank: End(code, self._first_signs[rank]) for rank, code in codes.items() if code is not None}

    def failed(self) -> dict[int, End]:
        """Return workers whose exit is known to be their own failure, by local rank, in the order of their deaths."""
        ends = {
            rank: end
            for rank, end in self._ends.items()
            if rank not in self._stopped and (end.exit_code != 0 or rank in self.inside)
        }
        return dict(sorted(ends.items(), key=lambda item: item[1].at))

    def stop(self, death_signal: int, grace_s: float) -> None:
        """Stop all workers that still run, and wait until they have exited.

        Args:
            death_signal: sent first.
            grace_s: time in seconds after which SIGKILL is sent.
        """
        while self.wait_for_end(0):
            pass
        # Workers that are already dying have failed by themselves. So have those that were killed as hung.
        alive = self._running - self._hang_reasons.keys()
        self._stopped |= {rank for rank in alive if not self._processes[rank].is_dying()}
        self._signal_running(death_signal)
        self._wait_all(grace_s)
        if self._running and death_signal != signal.SIGKILL:
            self._signal_running(signal.SIGKILL)
        # A process that takes longer is stuck in the kernel; waiting for it would block the agent too.
        self._wait_all(_KILL_WAIT_S)

    def finish(self, grace_s: float) -> float:
        """Ask training workers to exit after the current step, and give them time to do so.

        Args:
            grace_s: that time, in seconds.

        Returns:
            The time left, in seconds.
        """
        if not self._running <= self.inside:
            return grace_s
        began = self._clock.monotonic()
        self._stopped |= self._running
        self.send(Finish())
        self._wait_all(grace_s)
        return max(0.0, grace_s - (self._clock.monotonic() - began))

    def _signal_running(self, number: int) -> None:
        for rank in self._running:
            self._processes[rank].signal(number)

    def _wait_all(self, timeout_s: float) -> None:
        deadline = self._clock.monotonic() + timeout_s
        while self._running and (remaining_s := deadline - self._clock.monotonic()) > 0:
            self.wait_for_end(remaining_s)

    def close(self, death_signal: int, grace_s: float) -> None:
        """Stop all workers as `stop` does, and release their channels."""
        self.stop(death_signal, grace_s)
        for process in self._processes.values():
            process.channel.close()
        for process in self._leaving:
            process.leave(_KILL_WAIT_S)
        self._leaving.clear()


def _close_files(stdio: list[int]) -> None:
    for number in stdio:
        if number > 2:
            os.close(number)
