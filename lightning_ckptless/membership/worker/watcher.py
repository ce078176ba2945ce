"""The watcher of one worker: hears of faults while the training thread is busy, and sets it free.

The training thread may wait in a collective for a rank that is dead, or compute for a long time. The watcher listens
to the agent in a thread of its own. When a fault is told, it cuts the connections of the generation that is over, until
the training thread has let go of them: whatever that does with them fails, and is caught where the step began. Where
gloo has lost a thread that waited in it, it says so to the agent (`lost_waits.py`).
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.stuck_collectives import StuckCollectives, main_thread_waits
from lightning_ckptless.membership.worker.stuck_evidence import evidence
from lightning_ckptless.protocol.messages import (
    AskToLeave,
    AwaitRegroup,
    Blocked,
    Finish,
    MayLeave,
    Message,
    QueryBlocked,
    Regroup,
    ReleasedGroups,
    RunOver,
    StuckCollective,
    TrainingFailed,
)
from lightning_ckptless.protocol.uneven_steps import AtEnd

log = logging.getLogger(__name__)

_CUT_EVERY_S = 0.01
_CLOSE_S = 5.0
"""For the thread to end when it is asked to: it may be in the middle of cutting connections."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What an agent has told its workers after a fault.

    Args:
        number: under which they meet; grows with every regrouping of a run.
        fault: why.
        told_at: wall clock at which this worker read it, seconds since the epoch.
        env: what makes this process the rank that it is from then on: its number may be another one.
    """

    number: int
    fault: FaultReport
    told_at: float
    env: Mapping[str, str] = field(default_factory=dict)


class Watcher:
    """Listens on a worker's line for as long as it trains.

    Args:
        channel: to the agent; stays open.
        cut: frees the training thread, as far as it can be freed, and returns how many connections were still there;
            called again from the news of a fault until `release`.
        number: regrouping that this worker belongs to; 0 before the first.
    """

    def __init__(self, channel: AgentChannel, cut: Callable[[], int], number: int = 0) -> None:
        self._channel = channel
        self._cut = cut
        self._accepted = number
        self._is_leaving = False
        self._latest: Assignment | None = None
        self._finish_asked = False
        self._is_run_over = False
        self._failure = ""
        self._may_leave: int | None = None
        self._waits = StuckCollectives()
        self._is_on_hold = False
        self._changed = threading.Condition()
        # A count, and not the end of a pipe: forked dataloader workers hold duplicates of whatever this process opens,
        # and an end shows only when the last of them is closed.
        self._asked_to_close = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._listen, name="ckptless-watcher", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ training thread

    @property
    def is_over(self) -> bool:
        """Whether the generation that this worker belongs to is over."""
        return self._pending() is not None

    def heed(self) -> None:
        """Go no further where the generation is over. A rank that needs nobody else would not notice.

        Raises:
            TransportError: it is.
        """
        if self.is_over:
            raise TransportError("the ranks meet anew; this one was told between two collectives")

    @property
    def finish_asked(self) -> bool:
        """Whether the run is to end after this step."""
        return self._finish_asked

    @property
    def is_run_over(self) -> bool:
        """Whether no regrouping will come any more."""
        return self._is_run_over or self._channel.ended

    @property
    def failure(self) -> str:
        """Why training cannot continue, as the agent has found it; empty where it can."""
        return self._failure

    def ask_to_leave(self, at: AtEnd) -> bool:
        """Ask whether the training loop may be left, and wait for the answer.

        Args:
            at: where this worker has ended.

        Returns:
            False where this worker is to meet others instead.
        """
        self.send(AskToLeave(self._accepted, at.step, at.why))
        with self._changed:
            self._changed.wait_for(self._has_answer)
            return self._pending() is None

    def send(self, message: Message) -> None:
        """Send the agent a message."""
        self._channel.send(message)

    def accept(self, timeout_s: float) -> Assignment | None:
        """Take notice of the newest regrouping, waiting for it if it is not there yet.

        Args:
            timeout_s: longest wait, but for the time in which the nodes meet anew.

        Returns:
            None where none came, or the agent is gone.
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
        """The generation that is over has been left: from here on connections are new, and none of them is cut."""
        with self._changed:
            self._is_leaving = False
        self.send(ReleasedGroups())

    def close(self) -> None:
        """End the thread, whatever processes this one has forked meanwhile."""
        os.eventfd_write(self._asked_to_close, 1)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("ckptless: the watcher has not ended within %g s; it ends with this process", _CLOSE_S)
            return
        os.close(self._asked_to_close)

    # ------------------------------------------------------------------ the thread

    def _pending(self) -> Assignment | None:
        latest = self._latest
        return latest if latest is not None and latest.number > self._accepted else None

    def _is_to_cut(self) -> bool:
        return self._pending() is not None or self._is_leaving or self._is_run_over or bool(self._failure)

    def _has_assignment_or_end(self) -> bool:
        return self._pending() is not None or self.is_run_over or bool(self._failure)

    def _has_answer(self) -> bool:
        return self._may_leave == self._accepted or self._finish_asked or self._has_assignment_or_end()

    def _has_word(self) -> bool:
        return self._has_assignment_or_end() or self._is_on_hold

    def _listen(self) -> None:
        while not self._channel.ended:
            timeout_s = _CUT_EVERY_S if self._is_to_cut() else None
            ready = select.select([self._channel.fileno(), self._asked_to_close], [], [], timeout_s)[0]
            if self._asked_to_close in ready:
                return
            if self._channel.fileno() in ready:
                self._read()
            # Under the lock: who has let go makes new connections, and none of those must be cut.
            with self._changed:
                if self._is_to_cut():
                    self._look_for_lost_waits(self._cut())
        with self._changed:
            self._changed.notify_all()

    def _look_for_lost_waits(self, connections: int) -> None:
        reason = self._waits.look(connections, time.monotonic())
        if reason is not None:
            self._waits = StuckCollectives()
            self.send(StuckCollective(reason, **evidence()))

    def _read(self) -> None:
        received = self._channel.receive()
        if received is None:
            return
        if isinstance(received.message, QueryBlocked):
            self.send(Blocked(main_thread_waits()))
            return
        with self._changed:
            self._take_in(received.message)
            self._changed.notify_all()

    def _take_in(self, message: Message) -> None:
        match message:
            case Finish():
                self._finish_asked = True
            case TrainingFailed(reason):
                self._failure = reason
            case RunOver():
                self._is_run_over = True
            case MayLeave(number):
                # An answer to a question from before a fault does not count.
                self._may_leave = number
            case AwaitRegroup():
                self._is_on_hold = True
            case Regroup(number, fault, env):
                self._is_on_hold = False
                # A fault while nodes join has its own number, and may arrive before the regrouping with them.
                if self._latest is None or number > self._latest.number:
                    self._latest = Assignment(number, FaultReport(**fault), time.time(), env)
                    self._waits = StuckCollectives()
