"""The faults whose recovery has not been reported yet, as one rank knows them.

Apart from `report`, because which faults a recovery includes is decided by instants alone.

An agent knows the faults of its own node, and which of them were followed by a committed step as far as its own workers
know. The rank that reports recoveries has seen the faults of all nodes, and knows which recoveries it has reported. So
every fault is in one reported recovery: no two of them overlap, and none is left out because another fault occurred
before this rank learned of the first committed step.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_ckptless.membership.channel.fault_report import FaultReport


class UnreportedFaults:
    """The faults since the last reported recovery.

    Args:
        first: fault after which this process was started; None if there was none.
    """

    def __init__(self, first: FaultReport | None) -> None:
        self._faults = () if first is None else (*first.earlier, first.as_earlier)
        self._reported_until = 0.0

    def add(self, fault: FaultReport) -> FaultReport:
        """Add a fault; returns it with all earlier ones that its recovery includes."""
        known = {*fault.earlier, *self._faults} - {fault.as_earlier}
        earlier = tuple(sorted(each for each in known if each[0] >= self._reported_until))
        self._faults = (*earlier, fault.as_earlier)
        return replace(fault, earlier=earlier)

    def settle(self, regrouped_at: float) -> None:
        """Record that a step was committed, and that the recovery before it was reported.

        Args:
            regrouped_at: wall clock at which its ranks had regrouped: all of its faults were earlier.
        """
        self._faults, self._reported_until = (), regrouped_at
