"""The vote at the end of a round: every rank sends one integer, and all receive the bitwise AND of these integers.

Apart from `mirror`, because it is pure: what a round may decide is tested without threads and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_COMPLETE, _MAY_CONTINUE, _HAS_INTERVALS, _NO_REWIND = 1, 2, 4, 8
_INTERVALS_SHIFT = 4


@dataclass(frozen=True, slots=True)
class RoundVote:
    """The vote of one rank, or the outcome for all of them.

    | Bits | Field | In the vote of a rank | In the outcome |
    |---|---|---|---|
    | 0 | `complete` | the rank has all its copies of the version | every rank has: the version is committed |
    | 1 | `may_continue` | the rank was not asked to stop | no rank was; otherwise a coordinated stop begins |
    | 2 | `accepted_intervals` is not None | the rank knows which intervals it accepts | every rank knows |
    | 3 | `no_rewind` | the rank asks for no rewind | no rank does; otherwise all stop at one point to decide |
    | 4 and up | `accepted_intervals` | one bit per interval that it accepts | the intervals that all accept |

    Args:
        complete: see the table.
        may_continue: see the table.
        accepted_intervals: intervals between versions, as bits (see `protocol.mirror_interval`); None if unknown.
        no_rewind: see the table.
    """

    complete: bool
    may_continue: bool = True
    accepted_intervals: int | None = None
    no_rewind: bool = True

    def encode(self) -> int:
        """Convert to bits."""
        bits = (_COMPLETE if self.complete else 0) | (_MAY_CONTINUE if self.may_continue else 0)
        bits |= _NO_REWIND if self.no_rewind else 0
        if self.accepted_intervals is not None:
            bits |= _HAS_INTERVALS | self.accepted_intervals << _INTERVALS_SHIFT
        return bits

    @classmethod
    def decode(cls, bits: int) -> RoundVote:
        """Convert from bits."""
        intervals = bits >> _INTERVALS_SHIFT if bits & _HAS_INTERVALS else None
        return cls(bool(bits & _COMPLETE), bool(bits & _MAY_CONTINUE), intervals, bool(bits & _NO_REWIND))

    def combine(self, conjunction: Callable[[int], int]) -> RoundVote:
        """Combine with the votes of the other ranks. Collective.

        Args:
            conjunction: returns the bitwise AND over all ranks (`Transport.vote`).

        Raises:
            TransportError: a peer is lost.
        """
        return RoundVote.decode(conjunction(self.encode()))
