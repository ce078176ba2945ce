"""Divergence: replicas that should be equal bit for bit and are not, and which rank is wrong.

A difference is found by the digest of a whole shard, and located by the digests of its pieces. A rank is wrong if more
than half of all ranks with a piece agree on other bytes. That takes three ranks; of two, either may be wrong.

What follows is decided by all ranks with the same function, from what they have gathered at a point between two steps:

| Finding | What follows |
|---|---|
| a tensor was written to while it was copied, and the ranks agree now | nothing: the version is discarded |
| the run has not committed a version after its first one, and this is the third time in a row | replicas are sent |
| it has not committed any version | nothing: there is none to go back to |
| `raise`, or the fourth time in a row | the run ends |
| `warn` | replicas are sent, so that the run stays protected |
| `heal`, and a majority shows the same rank to be wrong again | this rank is replaced |
| otherwise, with `heal` and `rewind` | all ranks go back to the newest committed version |

That version is older than the difference: no version that contains or follows it is committed. So the replay is the run
without it.

With a device tier, in which each rank keeps what it has itself, replicas are not sent: the run ends instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from lightning_ckptless.protocol.versions import Version

MOST_NAMED = 3
"""Number of tensors that a message names."""
TIMES_UNTIL_SENT = 3
"""Differences in a row, from the beginning of a run, that show replicas to be legitimately different."""
MOST_IN_A_ROW = 3
"""Differences without a newly committed version in between that all ranks go back from."""


def outvoted(digests: Mapping[int, str]) -> frozenset[int]:
    """The ranks that differ from the majority; empty without a majority.

    Args:
        digests: what each rank has found.
    """
    digest, votes = Counter(digests.values()).most_common(1)[0]
    if 2 * votes <= len(digests):
        return frozenset()
    return frozenset(rank for rank, found in digests.items() if found != digest)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a tensor of which ranks have different bytes.

    Args:
        name: name of the tensor in the layout.
        offsets: start of the piece in each dimension.
        sizes: size of the piece in each dimension.
        digests: digest of its bytes, by rank.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: Mapping[int, str]

    def __str__(self) -> str:
        ranges = ", ".join(f"{at}:{at + size}" for at, size in zip(self.offsets, self.sizes, strict=True))
        return f"{self.name}[{ranges}]"

    @property
    def wrong(self) -> frozenset[int]:
        """The ranks that differ from the majority; empty without a majority."""
        return outvoted(self.digests)


@dataclass(frozen=True, slots=True)
class Difference:
    """A version of which replicas differ.

    Args:
        version: the version.
        pieces: the pieces that differ between the writers and holders of the version; none if another rank differs.
        shards: the shards in which there is a difference.
    """

    version: Version
    pieces: tuple[Piece, ...]
    shards: tuple[int, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose bytes were compared."""
        return tuple(sorted({rank for piece in self.pieces for rank in piece.digests}))

    @property
    def wrong(self) -> tuple[int, ...]:
        """The ranks that a majority shows to be wrong; empty if it does not for some piece."""
        found = [piece.wrong for piece in self.pieces]
        return tuple(sorted(frozenset[int]().union(*found))) if all(found) else ()

    def __str__(self) -> str:
        named = ", ".join(str(piece) for piece in self.pieces[:MOST_NAMED])
        more = f" and {len(self.pieces) - MOST_NAMED} more pieces" if len(self.pieces) > MOST_NAMED else ""
        return f"{named}{more} of {self.version} differ between ranks {', '.join(map(str, self.ranks))}"


def different_pieces(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces of which ranks have different bytes."""
    return tuple(piece for piece in pieces if len(set(piece.digests.values())) > 1)


class Consequence(Enum):
    """What follows from a difference."""

    NOTHING = auto()
    GO_BACK = auto()
    REPLACE = auto()
    SEND = auto()
    END = auto()


@dataclass(frozen=True, slots=True)
class PastDifferences:
    """The differences since the run last committed a new version.

    Args:
        count: number of them.
        committed: newest committed version at the latest of them.
        wrong: the ranks that were wrong in any of them.
    """

    count: int = 0
    committed: Version | None = None
    wrong: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Finding:
    """What all ranks have gathered about a difference.

    Args:
        difference: the difference, as the slots contain it.
        live: the same pieces, or all of the shards, in the tensors of all ranks, some steps later.
        torn: whether some rank has found that its copy of the version was torn.
        committed: newest committed version; None if there is none.
        has_agreed: whether the replicas of all ranks have agreed after a step of this run.
        reach: steps that may lie between the cause and its discovery: 0 unless ranks are compared in turns.
    """

    difference: Difference
    live: Sequence[Piece]
    torn: bool
    committed: Version | None
    has_agreed: bool
    reach: int = 0

    @property
    def has_vanished(self) -> bool:
        """Whether all ranks have the same bytes again."""
        return not different_pieces(self.live)

    @property
    def wrong(self) -> tuple[int, ...]:
        """The ranks that a majority shows to be wrong, by the version itself or by what the ranks have now."""
        return self.difference.wrong or self._now.wrong

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces that differ."""
        return self.difference.pieces or self._now.pieces

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose bytes were compared."""
        return (self.difference if self.difference.pieces else self._now).ranks

    @property
    def _now(self) -> Difference:
        return Difference(self.difference.version, different_pieces(self.live))

    @property
    def facts(self) -> dict[str, Any]:
        """The finding as fields of an event."""
        return {
            "step": self.difference.version.optimizer_step,
            "version": str(self.difference.version),
            "committed": -1 if self.committed is None else self.committed.optimizer_step,
            "tensors": [str(piece) for piece in self.pieces[:MOST_NAMED]],
            "ranks": list(self.ranks),
            "wrong": list(self.wrong),
            "found_by": "comparison",
        }

    def __str__(self) -> str:
        what = str(self.difference)
        if not self.difference.pieces:
            now = str(self._now) if self._now.pieces else f"parts of {self.difference.version} differed for a while"
            what = f"{now}, found when their turn came, so that the steps before may follow from it"
        return f"{what}; {verdict_on(self.wrong)}"


def verdict_on(wrong: Collection[int]) -> str:
    """Say which ranks a majority shows to be wrong, if any."""
    if not wrong:
        return "which of them is wrong is unknown"
    named = " and ".join(f"rank {rank}" for rank in sorted(wrong))
    return f"by majority {named} {'is' if len(wrong) == 1 else 'are'} wrong"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from a difference, and why.

    Args:
        consequence: what follows.
        reason: explanation, one sentence.
        past: the differences so far, this one included.
        version: version that all ranks go back to; None if they do not.
    """

    consequence: Consequence
    reason: str
    past: PastDifferences
    version: Version | None = None


def judge(finding: Finding, policy: str, before: Collection[PastDifferences], *, may_send: bool = True) -> Judgement:
    """Decide what follows from a difference.

    Args:
        finding: what all ranks have gathered.
        policy: `heal`, `rewind`, `raise` or `warn`.
        before: the past differences of each rank; a rank that has joined since has none.
        may_send: whether the run could continue with replicas that differ, and are sent; otherwise it ends instead.
    """
    past = max(before, key=lambda each: each.count)
    if past.count and _has_progressed(past, finding):
        past = PastDifferences()
    count, again = past.count + 1, past.wrong & frozenset(finding.wrong)
    consequence = _consequence(finding, policy, count, again)
    if consequence is Consequence.SEND and not may_send:
        consequence = Consequence.END
    now = PastDifferences(count, finding.committed, past.wrong | frozenset(finding.wrong))
    setting = "replicas='send'" if may_send else "replicas='send' and device_tier='off'"
    mixed = f"if ranks run on different hardware or libraries, set {setting}"
    reason = f"{finding}{_explanation(consequence, finding, policy, count, mixed)}"
    return Judgement(consequence, reason, now, finding.committed if consequence is Consequence.GO_BACK else None)


def _has_progressed(past: PastDifferences, finding: Finding) -> bool:
    """Whether the run has committed versions since the last difference that this one cannot follow from."""
    if past.committed is None or finding.committed is None:
        return past.committed != finding.committed
    gained = finding.committed.optimizer_step - past.committed.optimizer_step
    return past.committed != finding.committed and gained >= finding.reach


def _consequence(finding: Finding, policy: str, count: int, again: frozenset[int]) -> Consequence:
    if finding.torn and finding.has_vanished:
        return Consequence.NOTHING
    if policy == "raise":
        return Consequence.END
    if policy == "warn" or (count >= TIMES_UNTIL_SENT and not finding.has_agreed):
        return Consequence.SEND
    if finding.committed is None:
        return Consequence.NOTHING
    if policy == "heal" and again and finding.has_agreed:
        return Consequence.REPLACE
    return Consequence.END if count > MOST_IN_A_ROW else Consequence.GO_BACK


def _explanation(consequence: Consequence, finding: Finding, policy: str, count: int, mixed: str) -> str:
    if consequence is Consequence.NOTHING:
        if finding.torn and finding.has_vanished:
            return ". A tensor was written to while it was copied, so this version is discarded"
        return ". No version is committed yet, so there is none to go back to"
    if consequence is Consequence.SEND:
        times = f", for the {count}rd time in a row from the beginning" if count == TIMES_UNTIL_SENT else ""
        return f"{times}. From now on replicas are sent, not compared: {mixed}"
    if consequence is Consequence.REPLACE:
        return ", again after a replay from agreeing replicas: it is replaced"
    if consequence is Consequence.END:
        why = "on_divergence='raise'" if policy == "raise" else f"{count} times in a row, also after replays"
        return f" ({why}). Check the hardware of these ranks; {mixed}"
    return ""
