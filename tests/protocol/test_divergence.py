"""Which rank is wrong, and what follows from a difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.divergence import (
    Consequence,
    Difference,
    Finding,
    PastDifferences,
    Piece,
    judge,
)
from lightning_ckptless.protocol.versions import Version

V5, V6 = Version(5, True), Version(6, True)


def piece(*digests: str) -> Piece:
    return Piece("parameter/w", (0, 0), (4, 2), dict(enumerate(digests)))


def finding(
    slots: Piece, live: Piece | None = None, *, torn: bool = False, committed: Version | None = V5, agreed: bool = True
) -> Finding:
    return Finding(Difference(V6, (slots,)), [live or slots], torn, committed, agreed)


def late() -> Finding:
    """A difference on a rank that does not keep the shard."""
    return Finding(Difference(V6, (), (0,)), [piece("a", "b", "a")], False, V5, True, reach=3)


BAD_ONE = finding(piece("a", "b", "a"))
UNKNOWN = finding(piece("a", "b"))
NEVER = finding(piece("a", "b"), agreed=False)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_a_rank_is_wrong_only_if_more_than_half_agree_on_other_bytes(digests: list[str]) -> None:
    wrong = piece(*digests).wrong
    right = {digest for rank, digest in enumerate(digests) if rank not in wrong}
    if wrong:
        assert len(right) == 1 and 2 * len(wrong) < len(digests)
    else:
        assert len(set(digests)) == 1 or 2 * max(map(digests.count, digests)) <= len(digests)


def test_the_ranks_that_do_not_keep_the_shard_decide_too() -> None:
    assert finding(piece("a", "b"), piece("a", "b", "a", "a")).wrong == (1,)
    assert finding(piece("a", "b")).wrong == ()


@pytest.mark.parametrize(
    ("found", "policy", "past", "consequence"),
    [
        (BAD_ONE, "heal", PastDifferences(), Consequence.GO_BACK),
        (BAD_ONE, "rewind", PastDifferences(), Consequence.GO_BACK),
        (BAD_ONE, "raise", PastDifferences(), Consequence.END),
        (BAD_ONE, "warn", PastDifferences(), Consequence.SEND),
        # The same rank again, without progress.
        (BAD_ONE, "heal", PastDifferences(1, V5, frozenset({1})), Consequence.REPLACE),
        (BAD_ONE, "rewind", PastDifferences(1, V5, frozenset({1})), Consequence.GO_BACK),
        (BAD_ONE, "heal", PastDifferences(1, V5, frozenset({2})), Consequence.GO_BACK),
        # The run has made progress since.
        (BAD_ONE, "heal", PastDifferences(3, Version(4, True), frozenset({1})), Consequence.GO_BACK),
        (UNKNOWN, "heal", PastDifferences(2, V5), Consequence.GO_BACK),
        (UNKNOWN, "heal", PastDifferences(3, V5), Consequence.END),
        # From the beginning: mixed hardware.
        (NEVER, "heal", PastDifferences(1, V5), Consequence.GO_BACK),
        (NEVER, "heal", PastDifferences(2, V5), Consequence.SEND),
        (finding(piece("a", "b", "a"), agreed=False), "heal", PastDifferences(2, V5, frozenset({1})), Consequence.SEND),
        (finding(piece("a", "b"), committed=None, agreed=False), "heal", PastDifferences(), Consequence.NOTHING),
        (finding(piece("a", "b"), committed=None, agreed=False), "heal", PastDifferences(2), Consequence.SEND),
        # Found in turns, so the versions committed since the last one may follow from the same cause.
        (late(), "heal", PastDifferences(1, Version(4, True), frozenset({1})), Consequence.REPLACE),
        (late(), "heal", PastDifferences(1, Version(1, True), frozenset({1})), Consequence.GO_BACK),
        # Written to while it was copied.
        (finding(piece("a", "b"), piece("a", "a"), torn=True), "raise", PastDifferences(), Consequence.NOTHING),
        (finding(piece("a", "b"), piece("a", "b"), torn=True), "raise", PastDifferences(), Consequence.END),
        (finding(piece("a", "b"), piece("a", "a")), "heal", PastDifferences(), Consequence.GO_BACK),
    ],
)
def test_what_follows(found: Finding, policy: str, past: PastDifferences, consequence: Consequence) -> None:
    judged = judge(found, policy, [PastDifferences(), past])
    assert judged.consequence is consequence
    assert judged.version == (found.committed if consequence is Consequence.GO_BACK else None)
    is_first = past.committed != found.committed and (not found.reach or past.committed == Version(1, True))
    assert judged.past.count == (0 if is_first else past.count) + 1


def test_the_run_ends_where_replicas_that_differ_must_not_be_sent() -> None:
    judged = judge(NEVER, "heal", [PastDifferences(2, V5)], may_send=False)
    assert judged.consequence is Consequence.END and judged.version is None
    assert judged.reason.endswith("set replicas='send' and device_tier='off'")
    assert judge(BAD_ONE, "heal", [PastDifferences()], may_send=False).consequence is Consequence.GO_BACK


@pytest.mark.parametrize(
    ("found", "policy", "past", "words"),
    [
        (BAD_ONE, "heal", PastDifferences(), "parameter/w[0:4, 0:2] of step 6 differ between ranks 0, 1, 2"),
        (BAD_ONE, "heal", PastDifferences(), "by majority rank 1 is wrong"),
        (UNKNOWN, "heal", PastDifferences(), "differ between ranks 0, 1; which of them is wrong is unknown"),
        (late(), "heal", PastDifferences(), "ranks 0, 1, 2, found when their turn came"),
        (BAD_ONE, "raise", PastDifferences(), "on_divergence='raise'"),
        (BAD_ONE, "warn", PastDifferences(), "From now on replicas are sent, not compared"),
        (NEVER, "heal", PastDifferences(2, V5), "for the 3rd time in a row from the beginning"),
        (BAD_ONE, "heal", PastDifferences(1, V5, frozenset({1})), "it is replaced"),
    ],
)  # fmt: skip
def test_the_reason_names_tensor_ranks_and_consequence(
    found: Finding, policy: str, past: PastDifferences, words: str
) -> None:
    assert words in judge(found, policy, [past]).reason
