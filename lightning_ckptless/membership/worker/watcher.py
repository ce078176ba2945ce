"""The watcher of a worker: learns of faults while the training thread is busy, and unblocks that thread.

The training thread may wait in a collective for a dead rank, or compute for a long time. The watcher listens to the
agent in its own thread. When a fault is reported, it aborts the connections of the generation that has ended, until the
training thread has released them: any operation on them fails, and is caught where the step began. If a thread is stuck
in gloo, the watcher reports that to the agent (`stuck_collectives.py`).
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.worker.stuck_collectives import StuckCollectives, main_thread_waits
from lightning_ckptless.membership.worker.stuck_evidence import evidence
from lightning_ckptless.protocol.messages import (
    AskToLeave,
    AwaitRegroup,
    Blocked,
    Finish,
    HandOver,
    MayLeave,
    Message,
    QueryBlocked,
    Regroup,
    ReleasedGroups,
    Rewind,
    RewindDecided,
    RunOver,
    StuckCollective,
    TrainingFailed,
)
from lightning_ckptless.protocol.uneven_steps import AtEnd

log = logging.getLogger(__name__)

_CLOCK = Clock()
ABORT_EVERY_S = 0.01
"""Time in seconds between two attempts to unblock the training thread."""
_CLOSE_S = 5.0
"""Time for the thread to end on request: it may be aborting connections."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """An agent's announcement to its workers after a fault.

    Args:
        number: number of the regrouping; grows over a run.
        fault: why.
        notified_at: wall clock at which this worker read it, in seconds since the epoch.
        env: environment variables that define this process's rank from now on.
    """

    number: int
    fault: FaultReport
    notified_at: float
    env: Mapping[str, str] = field(default_factory=dict)


class Monitor(AbstractContextManager[object], Protocol):
    """What the training thread and the one that listens share, as `threading.Condition` has it."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Release the lock until a condition holds, for at most `timeout` seconds; returns whether it does."""

    def notify_all(self) -> None:
        """Let those that wait check their conditions."""


class Watcher:
    """What a worker's agent has told it, as long as the worker trains. `ThreadedWatcher` listens by itself.

    Args:
        channel: to the agent; stays open.
        abort: unblocks the training thread as far as possible, and returns how many connections still existed; called
            repeatedly from the news of a fault until `release`.
        number: regrouping that this worker belongs to; 0 before the first.
        monitor: protects what both threads use; None for a condition of this process.
        clock: clock of this process.

    Attributes:
        rewind: called with a rewind requested from another terminal.
    """

    def __init__(
        self,
        channel: AgentChannel,
        abort: Callable[[], int],
        number: int = 0,
        *,
        monitor: Monitor | None = None,
        clock: Clock = _CLOCK,
    ) -> None:
        self._channel = channel
        self.rewind: Callable[[Rewind], None] = self.refuse_rewind
        self._abort = abort
        self._accepted = number
        self._clock = clock
        self._is_leaving = False
        self._latest: Assignment | None = None
        self._finish_asked = False
        self._hand_over: HandOver | None = None
        self._is_run_over = False
        self._failure = ""
        self._may_leave: int | None = None
        self._waits = StuckCollectives()
        self._is_on_hold = False
        self._changed: Monitor = threading.Condition() if monitor is None else monitor

    # ------------------------------------------------------------------ training thread

    @property
    def is_over(self) -> bool:
        """Whether the generation that this worker belongs to has ended."""
        return self._pending() is not None

    def heed(self) -> None:
        """Raise if the generation has ended, which a rank that does not wait for others would not notice.

        Raises:
            TransportError: it has ended.
        """
        if self._pending() is not None:
            raise TransportError("the ranks are regrouping; this rank learned of it between two collectives")

    @property
    def finish_asked(self) -> bool:
        """Whether the run must end after this step."""
        return self._finish_asked

    @property
    def hand_over(self) -> HandOver | None:
        """The request to hand this rank over; None if there is none in this generation."""
        return self._hand_over

    @property
    def is_run_over(self) -> bool:
        """Whether no further regrouping will come."""
        return self._is_run_over or self._channel.ended

    @property
    def failure(self) -> str:
        """Why training cannot continue, as the agent reported it; empty if it can."""
        return self._failure

    def ask_to_leave(self, at: AtEnd) -> bool:
        """Ask whether this worker may leave the training loop, and wait for the answer.

        Args:
            at: this worker's last step.

        Returns:
            False if this worker must regroup with other ranks instead.
        """
        self.send(AskToLeave(self._accepted, at.step, at.why))
        with self._changed:
            self._changed.wait_for(self._has_answer)
            return self._pending() is None

    def send(self, message: Message) -> None:
        """Send the agent a message."""
        self._channel.send(message)

    def refuse_rewind(self, asked: Rewind) -> None:
        """Refuse a rewind: this worker does not train."""
        self.send(RewindDecided(asked.number, False, "the run is not training at the moment"))

    def accept(self, timeout_s: float) -> Assignment | None:
        """Accept the newest regrouping; waits for one if there is none yet.

        Args:
            timeout_s: longest wait in seconds, not counting the time while the nodes re-rendezvous.

        Returns:
            None if there was none in time, or the agent has exited.
        """
        with self._changed:
            self._changed.wait_for(self._has_word, timeout_s)
            if self._is_on_hold:
                self._changed.wait_for(self._has_assignment_or_end)
            found = self._pending()
            if found is not None:
                self._accepted, self._is_leaving = found.number, True
            return found

    def release(self) -> None:
        """Record that this worker has released the groups of the ended generation: new connections are not aborted."""
        with self._changed:
            self._is_leaving = False
        self.send(ReleasedGroups())

    # ------------------------------------------------------------------ the thread that listens

    def _pending(self) -> Assignment | None:
        latest = self._latest
        return latest if latest is not None and latest.number > self._accepted else None

    def _has_assignment_or_end(self) -> bool:
        return self._pending() is not None or self.is_run_over or bool(self._failure)

    def _has_answer(self) -> bool:
        return self._may_leave == self._accepted or self._finish_asked or self._has_assignment_or_end()

    def _has_word(self) -> bool:
        return self._has_assignment_or_end() or self._is_on_hold

    @property
    def has_to_abort(self) -> bool:
        """Whether the training thread may wait in a generation that has ended."""
        return self._pending() is not None or self._is_leaving or self._is_run_over or bool(self._failure)

    def abort_if_due(self) -> None:
        """Unblock the training thread, if it may wait in a generation that has ended."""
        # Under the lock: a worker that has released its groups opens new connections, which must not be aborted.
        with self._changed:
            if self.has_to_abort:
                self._look_for_stuck_collectives(self._abort())

    def note_end(self) -> None:
        """Note that the agent has closed the channel."""
        with self._changed:
            self._changed.notify_all()

    def _look_for_stuck_collectives(self, connections: int) -> None:
        reason = self._waits.poll(connections, self._clock.monotonic())
        if reason is not None:
            self._waits = StuckCollectives()
            self.send(StuckCollective(reason, **evidence()))

    def read(self) -> None:
        """Read the next message of the agent, waiting for it if there is none yet."""
        received = self._channel.receive()
        if received is None:
            return
        if isinstance(received.message, QueryBlocked):
            self.send(Blocked(main_thread_waits()))
            return
        if isinstance(received.message, Rewind):
            self.rewind(received.message)
            return
        with self._changed:
            self._take_in(received.message)
            self._changed.notify_all()

    def _take_in(self, message: Message) -> None:
        match message:
            case Finish():
                self._finish_asked = True
            case HandOver():
                self._hand_over = message
            case TrainingFailed(reason):
                self._failure = reason
            case RunOver():
                self._is_run_over = True
            case MayLeave(number):
                # Ignore the answer to a question from before a fault.
                self._may_leave = number
            case AwaitRegroup():
                self._is_on_hold = True
            case Regroup(number, fault, env):
                self._is_on_hold = False
                # The agent will ask again: the prepared process may have taken another rank.
                self._hand_over = None
                # A fault while nodes join has its own number, and may arrive before the regrouping with them.
                if self._latest is None or number > self._latest.number:
                    self._latest = Assignment(number, FaultReport(**fault), self._clock.wall(), env)
                    self._waits = StuckCollectives()


class ThreadedWatcher(Watcher):
    """A watcher with a thread of this process that listens.

    Args:
        channel: see `Watcher`.
        abort: see `Watcher`.
        number: see `Watcher`.
    """

    def __init__(self, channel: AgentChannel, abort: Callable[[], int], number: int = 0) -> None:
        super().__init__(channel, abort, number)
        # A counter rather than closing a pipe: forked dataloader workers hold duplicates of every file of this process,
        # and a pipe counts as closed only when the last duplicate is.
        self._asked_to_close = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._listen, name="ckptless-watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, even while processes that this one has forked still run."""
        os.eventfd_write(self._asked_to_close, 1)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("ckptless: the watcher thread did not stop within %g s; it ends with this process", _CLOSE_S)
            return
        os.close(self._asked_to_close)

    def _listen(self) -> None:
        while not self._channel.ended:
            timeout_s = ABORT_EVERY_S if self.has_to_abort else None
            ready = select.select([self._channel.fileno(), self._asked_to_close], [], [], timeout_s)[0]
            if self._asked_to_close in ready:
                return
            if self._channel.fileno() in ready:
                self.read()
            self.abort_if_due()
        self.note_end()
