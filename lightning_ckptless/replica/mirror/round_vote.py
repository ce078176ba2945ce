"""The vote at the end of a round: every rank sends one integer, and all receive the bitwise AND of these integers.

Apart from `mirror`, because it is pure: what a round may decide is tested without threads and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_ckptless.replica.mirror.coordinated_stop import StopPurpose

_COMPLETE, _NO_END, _NO_HAND_OVER, _HAS_INTERVALS, _NO_REWIND, _NO_DIFFERENCE = 1, 2, 4, 8, 16, 32
_INTERVALS_SHIFT = 6


@dataclass(frozen=True, slots=True)
class RoundVote:
    """The vote of one rank, or the outcome for all of them.

    | Bits | Field | In the vote of a rank | In the outcome |
    |---|---|---|---|
    | 0 | `complete` | the rank has all its copies of the version | every rank has: the version is committed |
    | 1 | `stop` is not `END` | the rank was not asked to end the run | no rank was; else all ranks stop |
    | 2 | `stop` is not `HAND_OVER` | the rank was not asked to hand over | the same |
    | 3 | `accepted_intervals` is not None | the rank knows which intervals it accepts | every rank knows |
    | 4 | `no_rewind` | the rank asks for no rewind | no rank does; otherwise all stop at one point to decide |
    | 5 | `no_difference` | what the rank has filled in for others agrees with its source | no replica differs |
    | 6 and up | `accepted_intervals` | one bit per interval that it accepts | the intervals that all accept |

    Args:
        complete: see the table.
        stop: why the ranks are to stop; None if they may continue.
        accepted_intervals: intervals between versions, as bits (see `protocol.mirror_interval`); None if unknown.
        no_rewind: see the table.
        no_difference: see the table.
    """

    complete: bool
    stop: StopPurpose | None = None
    accepted_intervals: int | None = None
    no_rewind: bool = True
    no_difference: bool = True

    def encode(self) -> int:
        """Convert to bits."""
        bits = _COMPLETE if self.complete else 0
        bits |= 0 if self.stop is StopPurpose.END else _NO_END
        bits |= 0 if self.stop is StopPurpose.HAND_OVER else _NO_HAND_OVER
        bits |= _NO_REWIND if self.no_rewind else 0
        bits |= _NO_DIFFERENCE if self.no_difference else 0
        if self.accepted_intervals is not None:
            bits |= _HAS_INTERVALS | self.accepted_intervals << _INTERVALS_SHIFT
        return bits

    @classmethod
    def decode(cls, bits: int) -> RoundVote:
        """Convert from bits."""
        intervals = bits >> _INTERVALS_SHIFT if bits & _HAS_INTERVALS else None
        stop = None if bits & _NO_HAND_OVER else StopPurpose.HAND_OVER
        stop = stop if bits & _NO_END else StopPurpose.END
        return cls(bool(bits & _COMPLETE), stop, intervals, bool(bits & _NO_REWIND), bool(bits & _NO_DIFFERENCE))

    def combine(self, conjunction: Callable[[int], int]) -> RoundVote:
        """Combine with the votes of the other ranks. Collective.

        Args:
            conjunction: returns the bitwise AND over all ranks (`Transport.vote`).

        Raises:
            TransportError: a peer is lost.
        """
        return RoundVote.decode(conjunction(self.encode()))
