"""What a run counts: its recoveries and rewinds.

Every rank counts, and rank 0 reports. A process that becomes rank 0 takes over the counts of a version. If the version
is the first one after a fault, they include that recovery, which ended when the version was committed. The counts of a
run that has left the training loop are in a note in the arenas as well: no further version has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RunCounts:
    """The counts of a run so far.

    Args:
        recoveries: recoveries, from faults and from changes of the nodes.
        failures: recoveries from faults.
        rewinds: rewinds.
        steps_replayed: optimizer steps that faults have undone.
        regrouped_at: when the ranks had regrouped in the last of the recoveries, in seconds since the epoch; 0 if there
            was none. Faults before that instant have been counted.
    """

    recoveries: int = 0
    failures: int = 0
    rewinds: int = 0
    steps_replayed: int = 0
    regrouped_at: float = 0.0

    def or_later(self, other: RunCounts) -> RunCounts:
        """The later one of two counts of the same run."""
        return max(self, other, key=lambda counts: (counts.recoveries, counts.rewinds))

    def after_rewind(self) -> RunCounts:
        """The counts after another rewind."""
        return replace(self, rewinds=self.rewinds + 1)

    def after_recovery(self, steps_replayed: int, regrouped_at: float, *, is_failure: bool) -> RunCounts:
        """The counts after another recovery.

        Args:
            steps_replayed: optimizer steps that its faults have undone.
            regrouped_at: when its ranks had regrouped.
            is_failure: whether it was from a fault.
        """
        failures, steps_replayed = self.failures + is_failure, self.steps_replayed + steps_replayed
        return RunCounts(self.recoveries + 1, failures, self.rewinds, steps_replayed, regrouped_at)
