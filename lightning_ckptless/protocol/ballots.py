"""The vote of a node's ranks in shared memory: the bitwise AND of one integer of each rank, round after round.

The memory has one *line* per voter, and each line has two *cells* of 8 bytes. A *ballot* is the contents of one cell:
the number of the round, modulo 2^16, and the bits of the vote. Only its voter writes to a line; the ballot of round r
is stored into cell r mod 2. In round r a voter

1. *casts*: stores its own ballot;
2. *collects*: reads the cell r mod 2 of each line that it awaits, until that has a ballot of round r.

Where all ranks are on one node, every rank awaits the lines of all. Between nodes, the lowest rank of each node leads.
It awaits the lines of its node, combines the outcome with the other leaders, and casts the result into one further
line, the *announcement*, which is all that its node's other ranks await.

**A voter is at most one round ahead.** Say that p waits for q if p awaits q's line, or the announcement of a leader
that awaits it. Every voter waits for every other one of its node. So p casts in round r+1 only after it has read a
ballot of round r of every q, or an announcement that was cast after such a ballot had been read. While q is in round
r, no voter is in round r+2: it would have read a ballot of round r+1 from q.

**No ballot is overwritten before all have read it.** The ballot of round r in p's line is overwritten in round r+2.
Then p has collected round r+1, so every other voter had cast in round r+1, and hence had collected round r before. The
same holds for the announcement: the leader casts it in round r+2 after it has collected round r+2, so the others have
cast in round r+2, and had collected round r+1 and r before.

**No ballot is mistaken for another.** While a voter collects round r, a cell r mod 2 contains its first zeros or the
ballot of round r-2 or r: never that of a round that is 2^16 older. Rounds are counted from 1; the zeros are round 0.

**How weaker rules fail.** With one cell per voter, a voter that has collected round r casts in round r+1 and thereby
overwrites a ballot that a slower one has yet to read, which then waits forever. With cells without the number of the
round, the ballot of round r-2 is taken for that of round r. `tests/protocol/test_ballots.py` finds both.

**After a death.** The memory belongs to one member set, and no other process ever maps it. A voter that dies after it
has cast leaves a valid ballot: it has promised what it voted for. One that dies before leaves the round incomplete, and
the next member set votes in new memory.

**Between nodes** the leaders combine by dissemination: in step k, leader i sends what it knows to leader i + 2^k and
receives from leader i - 2^k, modulo their number. After the last step, each has received the bits of every other one:
some of them more than once, which does not change a bitwise AND.
"""

from __future__ import annotations

from collections.abc import Sequence

BALLOT_BITS = 48
"""Most bits of a vote."""

CELLS_PER_LINE = 8
"""A line is 64 bytes long, as in the cache of the processor: voters do not slow each other down."""

BALLOTS_PER_LINE = 2
"""The first cells of a line, which contain ballots."""

_ROUND_BITS = 64 - BALLOT_BITS
_ROUND_MASK = (1 << _ROUND_BITS) - 1


class Voter:
    """One voter's part in all rounds. Reading and writing the cells, and waiting, is up to the caller.

    Args:
        line: the line that it casts into.
        awaited: the lines that it collects.

    Attributes:
        line: the same.
        round: number of the current round; 0 before the first.
        outcome: the bitwise AND of the ballots collected in this round; final once `awaited_cell` is None.
    """

    def __init__(self, line: int, awaited: Sequence[int]) -> None:
        self.outcome = 0
        self.line = line
        self.round = 0
        self._awaited = awaited
        self._collected = len(awaited)

    def cast(self, bits: int) -> tuple[int, int]:
        """Begin the next round.

        Args:
            bits: the vote.

        Returns:
            The cell to write to, and its new contents, which must be stored at once.
        """
        assert self.awaited_cell is None, "the previous round has not ended"
        assert 0 <= bits < 1 << BALLOT_BITS, f"a vote has at most {BALLOT_BITS} bits, not {bits.bit_length()}"
        self.round += 1
        self._collected = 0
        self.outcome = (1 << BALLOT_BITS) - 1
        return self._cell(self.line), bits << _ROUND_BITS | self.round & _ROUND_MASK

    @property
    def awaited_cell(self) -> int | None:
        """The cell to read next; None once the round is complete."""
        return self._cell(self._awaited[self._collected]) if self._collected < len(self._awaited) else None

    def take(self, contents: int) -> bool:
        """Process the contents of the awaited cell, read at once; returns whether it is a ballot of this round."""
        if not self._is_cast(contents):
            return False
        self.outcome &= contents >> _ROUND_BITS
        self._collected += 1
        return True

    def missing(self, cells: Sequence[int]) -> list[int]:
        """The awaited lines without a ballot of this round."""
        return [line for line in self._awaited[self._collected :] if not self._is_cast(cells[self._cell(line)])]

    def _is_cast(self, contents: int) -> bool:
        return contents & _ROUND_MASK == self.round & _ROUND_MASK

    def _cell(self, line: int) -> int:
        return line * CELLS_PER_LINE + self.round % BALLOTS_PER_LINE


def dissemination(place: int, places: int) -> list[tuple[int, int]]:
    """The steps of a dissemination: in each, the place that this one sends to and the place that it receives from.

    Args:
        place: place of this participant.
        places: number of participants.
    """
    distances = [1 << step for step in range((places - 1).bit_length())]
    return [((place + distance) % places, (place - distance) % places) for distance in distances]
