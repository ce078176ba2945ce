"""Which rank computes wrong gradients, what follows, and that no wrong step is left in the state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.divergence import Consequence
from lightning_ckptless.protocol.replay_check import (
    Comparison,
    PastMismatches,
    ReplayFinding,
    compare,
    judge_replay,
    runner_of,
)
from lightning_ckptless.protocol.versions import Version


def found_by(ranks: int, wrong: set[int]) -> list[Comparison]:
    """What a check finds if some ranks compute wrongly, each in its own way."""

    def digests(rank: int, owner: int) -> dict[str, str]:
        return {"loss": "same", "w": f"right {owner}" if rank not in wrong else f"{rank} wrong {owner}"}

    comparisons = []
    for owner in range(ranks):
        pair = [owner, runner_of(owner, 1, ranks)]
        if digests(pair[0], owner) != digests(pair[1], owner):
            runners = {*pair, runner_of(owner, 2, ranks)}
            comparisons.append(compare(owner, {rank: digests(rank, owner) for rank in sorted(runners)}))
    return comparisons


@given(st.integers(2, 9), st.data())
def test_a_wrong_rank_is_found_and_named_if_there_are_three(ranks: int, data: st.DataObject) -> None:
    wrong = data.draw(st.integers(0, ranks - 1))
    finding = ReplayFinding(8, 4, found_by(ranks, {wrong}))
    assert {each.owner for each in finding.comparisons} == {wrong, (wrong - 1) % ranks}
    assert finding.wrong == ({wrong} if ranks > 2 else set()) and wrong in finding.ranks
    assert finding.tensors == ("w",)
    assert not found_by(ranks, set())


def test_ranks_that_all_differ_are_not_named() -> None:
    assert ReplayFinding(8, 4, found_by(3, {0, 1})).wrong == frozenset()


BAD = ReplayFinding(8, 4, found_by(3, {1}), [Version(3, True), Version(4, True), Version(7, True)])
PAIR = replace(BAD, comparisons=found_by(2, {1}))
ONCE = PastMismatches(1, 8, frozenset({1}))


@pytest.mark.parametrize(
    ("finding", "policy", "past", "consequence"),
    [
        (ReplayFinding(8, 4), "heal", PastMismatches(), Consequence.NOTHING),
        (BAD, "heal", PastMismatches(), Consequence.GO_BACK),
        (BAD, "rewind", ONCE, Consequence.GO_BACK),
        (PAIR, "heal", PastMismatches(), Consequence.GO_BACK),
        (BAD, "raise", PastMismatches(), Consequence.END),
        (BAD, "warn", PastMismatches(), Consequence.NOTHING),
        # No step was made since they agreed: there is nothing to go back for.
        (replace(BAD, step=4), "heal", ONCE, Consequence.REPLACE),
        # They have never agreed.
        (replace(BAD, agreed_at=None), "heal", PastMismatches(), Consequence.END),
        (replace(BAD, step=4), "rewind", ONCE, Consequence.END),
        (replace(PAIR, step=4), "heal", PastMismatches(1, 8), Consequence.END),
        # Wrong again, then right: excluded all the same.
        (ReplayFinding(4, 4), "heal", replace(ONCE, excluded=frozenset({1})), Consequence.REPLACE),
        (replace(BAD, kept=[Version(5, True)]), "heal", PastMismatches(), Consequence.END),
        (PAIR, "heal", PastMismatches(3, 8), Consequence.END),
    ],
)
def test_what_follows(finding: ReplayFinding, policy: str, past: PastMismatches, consequence: Consequence) -> None:
    judged = judge_replay(finding, policy, past)
    assert judged.consequence is consequence
    assert judged.version == (Version(4, True) if consequence is Consequence.GO_BACK else None)
    assert judged.wrong == (frozenset({1}) if consequence is Consequence.REPLACE else frozenset())


def test_only_a_check_beyond_the_mismatch_is_progress() -> None:
    assert judge_replay(ReplayFinding(6, 4), "heal", ONCE).past == ONCE
    assert judge_replay(ReplayFinding(8, 6), "heal", ONCE).past == PastMismatches()


def test_the_same_rank_wrong_again_is_excluded_after_going_back() -> None:
    assert judge_replay(BAD, "heal", ONCE).past.excluded == frozenset({1})
    assert judge_replay(BAD, "rewind", ONCE).past.excluded == frozenset()


@pytest.mark.parametrize(
    ("finding", "policy", "past", "words"),
    [
        (BAD, "heal", PastMismatches(), "ranks 0, 1, 2 compute different gradients from the same micro-batch in step"),
        (BAD, "heal", PastMismatches(), ", of w; by majority rank 1 is wrong"),
        (PAIR, "heal", PastMismatches(), "which of them is wrong is unknown"),
        (BAD, "raise", PastMismatches(), "(on_divergence='raise'). Check the hardware of these ranks"),
        (replace(BAD, agreed_at=None), "heal", PastMismatches(), "in the first check"),
        (replace(BAD, kept=[]), "heal", PastMismatches(), "no version from before step 4 is left in memory"),
        (replace(PAIR, step=4), "heal", PastMismatches(), "so that going back does not help"),
        (PAIR, "heal", PastMismatches(3, 8), "4 times in a row"),
        (replace(BAD, step=4), "heal", ONCE, "rank 1 is wrong: it is replaced"),
        (BAD, "warn", PastMismatches(), "training continues"),
    ],
)  # fmt: skip
def test_the_reason_names_ranks_tensors_and_consequence(
    finding: ReplayFinding, policy: str, past: PastMismatches, words: str
) -> None:
    assert words in judge_replay(finding, policy, past).reason


@dataclass
class Run:
    """A run of three ranks, of which one is broken in some steps of its first process or of the first pass.

    Attributes:
        made_by: for each step of the state, whether it was made with a wrong gradient.
    """

    every: int
    broken_in: range
    is_transient: bool
    step: int = 0
    made_by: tuple[bool, ...] = ()
    passes: int = 0
    replaced: int = 0
    agreed_at: int | None = None
    past: PastMismatches = field(default_factory=PastMismatches)
    is_restored: bool = True
    has_ended: bool = False
    versions: dict[int, tuple[bool, ...]] = field(default_factory=lambda: {0: ()})

    def is_wrong(self) -> bool:
        return self.step in self.broken_in and not (self.replaced or (self.is_transient and self.passes))

    def check(self) -> None:
        self.is_restored = False
        comparisons = found_by(3, {1}) if self.is_wrong() else []
        kept = [Version(step, True) for step in self.versions]
        found = judge_replay(ReplayFinding(self.step, self.agreed_at, comparisons, kept), "heal", self.past)
        self.past = found.past
        if found.consequence is Consequence.END:
            assert self.agreed_at is None
            self.has_ended = True
            return
        if found.version is not None:
            self.step = self.agreed_at = found.version.optimizer_step
            self.passes += 1
        elif found.consequence is Consequence.REPLACE:
            assert found.wrong == {1}
            self.replaced += 1
        elif not comparisons:
            self.agreed_at = self.step
            return
        self.versions = {step: made for step, made in self.versions.items() if step <= self.step}
        self.made_by, self.is_restored = self.versions[self.step], True

    def advance(self) -> None:
        if self.is_restored or self.step % self.every == 0:
            self.check()
            if self.is_restored or self.has_ended:
                return
        self.made_by += (self.is_wrong(),)
        self.step += 1
        oldest = self.step - self.every - 1
        self.versions = {step: made for step, made in self.versions.items() if step >= oldest}
        self.versions[self.step] = self.made_by


@given(st.integers(1, 7), st.integers(0, 40), st.integers(1, 60), st.booleans())
def test_no_wrong_step_is_left_behind_a_check(every: int, first: int, length: int, is_transient: bool) -> None:
    run = Run(every, range(first, first + length), is_transient)
    checks = [step for step in range(0, 60, every) if step in run.broken_in]
    for _ in range(400):
        if run.step == 60 or run.has_ended:
            break
        run.advance()
    assert run.has_ended == (first == 0)
    assert run.step == 60 or run.has_ended
    if checks and not run.has_ended:
        # What followed the last check of the broken steps was not checked again.
        last = 60 - 60 % every
        assert not any(run.made_by[:last])
        assert run.passes + run.replaced <= 3
