"""A vote gives every voter the same outcome under every interleaving, and weaker rules do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.ballots import BALLOT_BITS, BALLOTS_PER_LINE, CELLS_PER_LINE, Voter, dissemination

MakeVoter = Callable[[int, Sequence[int]], Voter]


@dataclass(frozen=True)
class Sleep:
    """A voter's request to sleep until a cell is no longer what it has seen."""

    cells: list[int]
    cell: int
    seen: int


@dataclass(frozen=True)
class Wake:
    """A voter's request to wake all who sleep on a cell."""

    cells: list[int]
    cell: int


@dataclass
class Ranks:
    """The ranks of several nodes, run one load, store or call of the kernel at a time in random order.

    Args:
        sizes: number of ranks of each node.
        votes: vote of each rank, by round.
        random: chooses who runs next.
        make: makes the voters.
        lead: how many rounds a rank was ahead of another one at most.
        stale: payloads that were not those of the round in which they were read.
    """

    sizes: Sequence[int]
    votes: Sequence[Sequence[int]]
    random: Random
    make: MakeVoter = Voter
    lead: int = 0
    stale: int = 0
    outcomes: list[list[int]] = field(init=False)
    cast: list[int] = field(init=False)
    sleepers: dict[int, Sleep] = field(default_factory=dict)
    letters: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = sum(self.sizes)
        self.outcomes, self.cast = [[] for _ in range(count)], [0] * count
        self.running: dict[int, Iterator[Sleep | Wake | None]] = {}
        for node, size in enumerate(self.sizes):
            cells = [0] * ((size + 1) * CELLS_PER_LINE)
            places = dict[tuple[int, int], int]()
            for place in range(size):
                rank = sum(self.sizes[:node]) + place
                self.running[rank] = self._rank(rank, node, place, cells, places)

    def _rank(
        self, rank: int, node: int, place: int, cells: list[int], places: dict[tuple[int, int], int]
    ) -> Iterator[Sleep | Wake | None]:
        size, is_led = self.sizes[node], len(self.sizes) > 1
        awaited = [size] if is_led and place else range(size)
        voter = self.make(place, awaited)
        announcer = self.make(size, ())
        for number, votes in enumerate(self.votes, 1):
            places[place, number % BALLOTS_PER_LINE] = number
            yield None
            own_cell, ballot = voter.cast(votes[rank])
            self.cast[rank] += 1
            self.lead = max(self.lead, self.cast[rank] - min(self.cast))
            yield from self._store(cells, own_cell, ballot)
            while (cell := voter.awaited_cell) is not None:
                contents = cells[cell]
                yield None
                if not voter.take(contents):
                    yield Sleep(cells, cell, contents)
            outcome = voter.outcome
            for line in awaited:
                yield None
                self.stale += places[line, number % BALLOTS_PER_LINE] != number
            if is_led and not place:
                for target, source in dissemination(node, len(self.sizes)):
                    self.letters.setdefault((node, target), []).append(outcome)
                    while not (arrived := self.letters.get((source, node))):
                        yield None
                    outcome &= arrived.pop(0)
                places[size, number % BALLOTS_PER_LINE] = number
                yield None
                yield from self._store(cells, *announcer.cast(outcome))
            self.outcomes[rank].append(outcome)

    @staticmethod
    def _store(cells: list[int], cell: int, contents: int) -> Iterator[Wake | None]:
        yield None
        cells[cell] = contents
        yield Wake(cells, cell)

    def run(self, steps: int = 100_000, victim: int | None = None, dies_at: int = 0) -> None:
        """Run until every rank has finished or sleeps. A victim dies at a step."""
        for step in range(steps):
            if step == dies_at and victim is not None:
                self.running.pop(victim, None)
                self.sleepers.pop(victim, None)
            awake = [rank for rank in self.running if rank not in self.sleepers]
            if not awake:
                return
            self._advance(self.random.choice(awake))

    def _advance(self, rank: int) -> None:
        try:
            asked = next(self.running[rank])
        except StopIteration:
            del self.running[rank]
            return
        if isinstance(asked, Sleep) and asked.cells[asked.cell] == asked.seen:
            self.sleepers[rank] = asked
        if isinstance(asked, Wake):
            for sleeper, sleep in list(self.sleepers.items()):
                if sleep.cells is asked.cells and sleep.cell == asked.cell:
                    del self.sleepers[sleeper]

    @property
    def expected(self) -> list[int]:
        """The outcomes of all rounds."""
        return [reduce(and_, votes) for votes in self.votes]


SIZES = st.sampled_from([(1,), (2,), (4,), (1, 1), (2, 2), (1, 3), (3, 1, 2), (1, 1, 1, 1, 1)])


def random_votes(random: Random, sizes: Sequence[int], rounds: int = 6) -> list[list[int]]:
    return [
        [random.getrandbits(BALLOT_BITS) | random.getrandbits(BALLOT_BITS) for _ in range(sum(sizes))]
        for _ in range(rounds)
    ]


@given(sizes=SIZES, seed=st.integers(0, 1 << 32))
def test_all_ranks_get_the_conjunction_of_every_round(sizes: tuple[int, ...], seed: int) -> None:
    random = Random(seed)
    ranks = Ranks(sizes, random_votes(random, sizes), random)
    ranks.run()
    assert ranks.outcomes == [ranks.expected] * sum(sizes)
    assert (ranks.lead, ranks.stale) == (min(ranks.lead, 1), 0)


@given(sizes=SIZES, seed=st.integers(0, 1 << 32))
def test_a_death_ends_the_votes_in_the_same_round_or_the_next(sizes: tuple[int, ...], seed: int) -> None:
    random = Random(seed)
    victim, dies_at = random.randrange(sum(sizes)), random.randrange(60 * sum(sizes))
    ranks = Ranks(sizes, random_votes(random, sizes), random)
    ranks.run(3_000 * sum(sizes), victim, dies_at)
    assert ranks.lead <= 1
    for outcomes in ranks.outcomes:
        assert outcomes == ranks.expected[: len(outcomes)]
        assert abs(len(outcomes) - len(ranks.outcomes[victim])) <= 1


class OneCell(Voter):
    """A weaker rule: the ballots of all rounds are in the same cell."""

    def _cell(self, line: int) -> int:
        return line * CELLS_PER_LINE


class NoRound(Voter):
    """A weaker rule: any ballot counts."""

    def _is_cast(self, contents: int) -> bool:
        return contents != 0


@pytest.mark.parametrize("weaker", [OneCell, NoRound])
def test_weaker_rules_fail(weaker: MakeVoter) -> None:
    def fails(seed: int) -> bool:
        random = Random(seed)
        ranks = Ranks((3,), random_votes(random, (3,)), random, weaker)
        ranks.run()
        return ranks.outcomes != [ranks.expected] * 3

    assert any(map(fails, range(100)))


def test_the_number_of_the_round_wraps_around() -> None:
    cells, voters = [0] * (2 * CELLS_PER_LINE), [Voter(line, range(2)) for line in range(2)]
    for bits in range(1 << 16, (1 << 17) + 5):
        for voter in voters:
            cell, contents = voter.cast(bits)
            assert contents < 1 << 64
            cells[cell] = contents
        for voter in voters:
            assert voter.missing(cells) == []
            while (cell := voter.awaited_cell) is not None:  # type: ignore[assignment]
                assert voter.take(cells[cell])
            assert voter.outcome == bits


def test_a_ballot_that_was_not_cast_is_missing() -> None:
    cells, voter = [0] * (3 * CELLS_PER_LINE), Voter(1, range(3))
    cell, contents = voter.cast(7)
    assert voter.missing(cells) == [0, 1, 2]
    cells[cell] = contents
    assert voter.missing(cells) == [0, 2]


def test_a_vote_that_is_too_long_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="at most 48 bits, not 49"):
        Voter(0, [0]).cast(1 << BALLOT_BITS)


@given(places=st.integers(1, 70))
def test_a_dissemination_reaches_everyone(places: int) -> None:
    known = [{place} for place in range(places)]
    steps = [dissemination(place, places) for place in range(places)]
    for step in range((places - 1).bit_length()):
        sources = [steps[place][step][1] for place in range(places)]
        assert all(steps[source][step][0] == place for place, source in enumerate(sources))
        known = [known[place] | known[source] for place, source in enumerate(sources)]
    assert known == [set(range(places))] * places
    assert all(len(each) == (places - 1).bit_length() for each in steps)
