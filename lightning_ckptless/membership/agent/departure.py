"""The departure of a drained node: the other nodes rendezvous without it first, then its ranks are handed over.

    the leaving node                         the nodes that stay
    announces it, leaves the rendezvous
    its workers keep training                rendezvous, with nodes that join; their workers keep training
                                             all joining workers wait at the loop: ready to regroup
    asks its workers to hand over
        all ranks stop at the same committed step
    its workers exit with code 0
    is finished, its agent exits             notify their workers, which regroup without it

If rank 0 is on the leaving node, the workers of another node are restarted to take it. They cannot keep training
meanwhile, so the ranks are handed over first: the leaving node does not wait for the others, and they rendezvous when
it is finished. Otherwise the workers that are restarted would be missing from the step at which all ranks stop.

| Key | Written by | Content |
|---|---|---|
| `departure` | the leaving node | why it leaves, and whether it hands over first |
| `departure/ready` | a node that stays | |
| `departure/beat` | the leaving node, periodically | a number that grows |
| `departure/finished` | the leaving node | |
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from torch.distributed import DistError

from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import NodeDrained
from lightning_ckptless.membership.events import Report
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.protocol.messages import HandedOver, HandOver, Message

_WHY, _READY, _FINISHED = "ckptless/departure", "ckptless/departure/ready", "ckptless/departure/finished"
_BEAT = "ckptless/departure/beat"
_LOOK_EVERY_S = 0.05
_BEAT_EVERY_S = 1.0
_SILENT_S = 10.0
"""After this time without a beat, the leaving node is lost, and the others do not wait for it."""


class DepartedError(Exception):
    """Raised in the agent of a node whose work has been moved off it."""


class Departure:
    """The departure of a node from a rendezvous round, as seen by its own agent and those of the other nodes.

    Args:
        store: the agents' store for the round.
        is_shared: whether there are other nodes.
        clock: this node's clock.
    """

    def __init__(self, store: Any, clock: Clock, *, is_shared: bool) -> None:
        self._store = store
        self._clock = clock
        self._is_shared = is_shared
        self._looked_at = 0.0
        self._beat_at = 0.0
        self._heard: tuple[int, float] | None = None
        self._has_noted_ready = False

    def announce(self, why: str, *, hands_over_first: bool = False) -> str:
        """Announce that this node leaves; returns the given reason, or that of a node that announced it first.

        Args:
            why: the reason, as a sentence.
            hands_over_first: whether the other nodes are to rendezvous only when its workers have exited.
        """
        said: bytes = self._store.compare_set(_WHY, "", json.dumps([why, hands_over_first]))
        return str(json.loads(said)[0])

    def news(self) -> str:
        """Return why a node leaves, as a sentence, once the others are to rendezvous without it.

        Empty if none leaves, if it hands over first, or if it is too early to look again.
        """
        if not self._is_due():
            return ""
        why, hands_over_first = self._said()
        return "" if hands_over_first and not self.is_finished() else why

    def why(self) -> str:
        """Return why a node leaves, as a sentence; empty if none does."""
        return self._said()[0]

    def note_ready(self) -> None:
        """Record that the workers of the other nodes are ready to regroup without those of the leaving one."""
        if not self._has_noted_ready:
            self._has_noted_ready = True
            self._set(_READY)

    def others_are_ready(self) -> bool:
        """Whether the other nodes are ready to regroup; also true if their store is lost."""
        return self._is_due() and self._is_set(_READY)

    def beat(self) -> None:
        """Record that the leaving node is alive; called often."""
        now = self._clock.monotonic()
        if now - self._beat_at >= _BEAT_EVERY_S:
            self._beat_at = now
            with suppress(DistError):
                self._store.add(_BEAT, 1)

    def finish(self) -> None:
        """Record that the workers of the leaving node have exited."""
        self._set(_FINISHED)

    def is_finished(self) -> bool:
        """Whether the leaving node has handed over, or has been silent since this was first called."""
        if self._is_set(_FINISHED):
            return True
        now = self._clock.monotonic()
        beats, heard_at = self._heard or (0, now)
        with suppress(DistError):
            if (found := self._store.add(_BEAT, 0)) != beats:
                beats, heard_at = found, now
        self._heard = beats, heard_at
        return now - heard_at > _SILENT_S

    def _is_due(self) -> bool:
        now = self._clock.monotonic()
        if not self._is_shared or now - self._looked_at < _LOOK_EVERY_S:
            return False
        self._looked_at = now
        return True

    def _said(self) -> tuple[str, bool]:
        """Why a node leaves, or nothing, and whether it hands over first."""
        try:
            if not self._is_shared or not self._store.check([_WHY]):
                return "", False
            why, hands_over_first = json.loads(self._store.get(_WHY))
        except DistError:
            # The store was lost with its node, which heartbeats and the rendezvous detect.
            return "", False
        return str(why), bool(hands_over_first)

    def _is_set(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except DistError:
            return True

    def _set(self, key: str) -> None:
        # If the store is lost, so is the rendezvous, and the other nodes detect that themselves.
        with suppress(DistError):
            self._store.set(key, "1")


class LeavingWorkers(Protocol):
    """What a departure needs of the leaving node's workers; see `WorkerGroup`."""

    handed_over: dict[int, HandedOver]

    @property
    def all_train(self) -> bool:
        """Whether all workers run, are in the training loop and have not been allowed to leave it."""

    @property
    def all_at_end(self) -> bool:
        """Whether every worker in the training loop has completed its last step."""

    @property
    def running(self) -> int:
        """Number of workers that have not been seen to exit."""

    def lost(self) -> Mapping[int, End | None]:
        """Workers that are lost, by local rank."""

    def send(self, message: Message) -> None:
        """Send a message to all workers that run."""

    def allow_leave(self) -> None:
        """Tell workers that ask to leave the training loop that they may."""

    def stop(self, death_signal: int, grace_s: float) -> None:
        """Stop all workers that still run, and wait until they have exited."""


class Leaving:
    """The last phase of a node: it has left the rendezvous, and its workers train until they hand over.

    Args:
        node: its name.
        reason: why it leaves.
        departure: departure from the round.
        wait_s: longest wait for the other nodes to be ready, in seconds; 0 to hand over at once.
        report: receives events.
        clock: this node's clock.

    Attributes:
        summary: how this node has left the run; empty until it has.
    """

    def __init__(
        self, node: str, reason: str, departure: Departure, wait_s: float, report: Report, clock: Clock
    ) -> None:
        self.summary = ""
        self._node = node
        self._reason = reason
        self._departure = departure
        self._until = clock.monotonic() + wait_s
        self._report = report
        self._clock = clock
        self._has_asked = False

    def poll(self, workers: LeavingWorkers) -> None:
        """Hand over once the other nodes are ready.

        Args:
            workers: this node's workers.

        Raises:
            DepartedError: the workers have exited.
        """
        self._departure.beat()
        lost = workers.lost()
        steps = [message.step for message in workers.handed_over.values()]
        codes = {rank: None if end is None else end.exit_code for rank, end in lost.items()}
        if any(rank not in workers.handed_over for rank in lost):
            workers.stop(signal.SIGKILL, 0.0)
            self._end("a worker was lost before it handed over, so the step in flight is replayed", None, codes)
        if not workers.running:
            how = f"its ranks were handed over after step {max(steps)}" if steps else "its workers have ended"
            self._end(how, max(steps, default=None), codes)
        if workers.all_at_end:
            # The run ends before the departure. The workers of the other nodes do not wait for these.
            workers.allow_leave()
        elif workers.all_train and not self._has_asked and self._is_time():
            self._has_asked = True
            workers.send(HandOver(self._reason))

    def give_up(self, workers: LeavingWorkers) -> None:
        """Stop the workers before they have handed over: those of the other nodes regroup after a fault.

        Args:
            workers: this node's workers.

        Raises:
            DepartedError: the workers have exited.
        """
        workers.stop(signal.SIGKILL, 0.0)
        how = "another node had a fault before the ranks were handed over, so the step in flight is replayed"
        self._end(how, None, {})

    def _is_time(self) -> bool:
        return self._clock.monotonic() >= self._until or self._departure.others_are_ready()

    def _end(self, how: str, step: int | None, codes: Mapping[int, int | None]) -> None:
        self._departure.finish()
        self.summary = f"this node has left the run: {how}"
        self._report(NodeDrained(self._node, self._reason, self.summary, step, codes))
        raise DepartedError(self.summary)
