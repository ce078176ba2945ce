"""The faults that one agent has seen: the report of each, and which ones no committed step has followed yet."""

from __future__ import annotations

from collections.abc import Callable

from lightning_ckptless.membership.channel.fault_report import FaultReport, split_exit
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import Announcement, Fault, Report
from lightning_ckptless.membership.forkserver.client import End


class FaultLog:
    """The faults of one node.

    Args:
        node: its name.
        faults: faults of all agents of this node so far; extended.
        report: receives events.
        why_full: explains why no more output can be written; empty if it can.
        clock: this node's clock.

    Attributes:
        lost_at: wall clock at which other nodes were lost, which has yet to be reported as a fault; 0 if none was.
    """

    def __init__(
        self, node: str, faults: list[FaultReport], report: Report, why_full: Callable[[], str], clock: Clock
    ) -> None:
        self.lost_at = 0.0
        self._node = node
        self._faults = faults
        self._unresolved: list[FaultReport] = []
        self._report = report
        self._why_full = why_full
        self._clock = clock

    @property
    def last(self) -> FaultReport | None:
        """The newest fault; None before the first."""
        return self._faults[-1] if self._faults else None

    def resolve(self) -> None:
        """Record that a new step was committed: later faults interrupt no recovery."""
        self._unresolved.clear()

    def of_worker(
        self,
        rank: int,
        pid: int,
        end: End | None,
        *,
        detected_at: float,
        world_size: int,
        hung: str,
        out_of_memory: str,
        drained: str = "",
    ) -> FaultReport:
        """Return the report of a lost worker.

        Args:
            rank: its rank.
            pid: its process id.
            end: how it exited; None if unknown.
            detected_at: wall-clock time of its detection.
            world_size: number of ranks.
            hung: why it was killed as hung; empty if it was not.
            out_of_memory: what the kernel has killed for lack of memory, in words; empty for nothing.
            drained: why its rank was handed over, which is no fault; empty if it was not.
        """
        code, signal_name = (None, None) if end is None else split_exit(end.exit_code)
        return FaultReport(
            rank=rank,
            pid=pid,
            exit_code=code,
            signal_name=signal_name,
            died_at=detected_at if end is None else end.at,
            detected_at=detected_at,
            stopped_at=self._clock.wall(),
            restart=len(self._faults) + (not drained),
            world_size=world_size,
            hung=hung,
            earlier=tuple(fault.as_earlier for fault in self._unresolved),
            out_of_memory=out_of_memory,
            drained=drained,
        )

    def of_change(self, world_size: int, detected_at: float | None = None, *, drained: str = "") -> FaultReport:
        """Return the report of a change of the nodes that no worker of this node has caused.

        Args:
            world_size: number of ranks before it.
            detected_at: wall clock at which it was noticed; None for now.
            drained: why a node was drained; empty if none was.
        """
        now = self._clock.wall()
        at = now if detected_at is None else detected_at
        died_at, count = self.lost_at or at, len(self._faults) + 1
        return FaultReport(None, None, None, None, died_at, at, now, count, world_size, drained=drained)

    def add(self, fault: FaultReport) -> None:
        """Add a fault."""
        self._faults.append(fault)
        self._unresolved.append(fault)
        self._report(Fault(self._node, fault))
        if full := self._why_full():
            self._report(Announcement(full))

    def add_lost_rendezvous(self, world_size: int) -> None:
        """Add the loss of the rendezvous, which ends this agent: the next agent of this node reports it."""
        now = self._clock.wall()
        self._faults.append(FaultReport(None, None, None, None, now, now, now, len(self._faults) + 1, world_size))
