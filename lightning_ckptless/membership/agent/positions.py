"""Positions: what the agents of a round share about where their workers are.

An agent sees its own workers only. Two questions need those of all nodes: whether all ranks have the same last step,
and which rank the others wait for. So an agent publishes the last steps of its workers, and their positions while all
of them are silent. In a run that makes progress nothing is written or read.

| Key | Written by | Content |
|---|---|---|
| `end/NUMBER/FIT` | the first node whose workers have all ended | their last steps |
| `ended/NUMBER/FIT` | every such node | number of such nodes |
| `silent/NODE` | a node whose workers are all silent | their positions; empty when one makes progress again |
| `uneven` | the first node that finds unequal numbers of steps | why no rank can continue |
| `uneven/known` | every node that has read this | the number of such nodes |

NUMBER is the regrouping that the workers belong to. FIT counts the calls of `fit` that have ended since.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.formats.schema import (
    MOST_RANKS,
    Check,
    SchemaError,
    boolean,
    integer,
    number,
    one_of,
    optional,
    record,
    table,
    text,
)
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.membership.events import EntryIgnored, Report
from lightning_ckptless.protocol.hang_detection import Point, RankProgress
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded

Answer = TypeVar("Answer")

_END = "ckptless/end/{}/{}"
_ENDED = "ckptless/ended/{}/{}"
_SILENT = "ckptless/silent/{}"
_UNEVEN = "ckptless/uneven"
_KNOWN = "ckptless/uneven/known"
_FINISHED = "ckptless/finished"


def _rank(value: Any, place: str) -> int:
    return int(text(r"\d{1,6}")(value, place))


def _by_rank(of_one: Check) -> Check:
    return record(ranks=table(_rank, of_one, most=MOST_RANKS))


_ENDS = _by_rank(
    record(lambda step, why: AtEnd(step, WhyEnded(why)), step=integer(), why=one_of(*(str(why) for why in WhyEnded)))
)
_PROGRESS = _by_rank(
    record(
        lambda point, silent_s, **fields: RankProgress(point=Point(point), at=-silent_s, own_s=0.0, **fields),
        step=integer(-1),
        point=integer(min(Point), max(Point)),
        count=integer(),
        silent_s=number(),
        longest_pause_s=number(),
        stopped=boolean,
        traced=boolean,
        epoch=integer(-1),
        out_of_data=boolean,
        waits=optional(boolean),
        idle_s=number(),
    )
)
_REASON = record(reason=text())


class Positions:
    """The positions of one round of the rendezvous, as one agent sees them.

    A lost store answers nothing and is not asked again: heartbeats and the rendezvous detect the loss of its node.

    Args:
        store: store that all agents of the round share.
        node: number of this node.
        peers: numbers of the nodes whose workers train together, this one included.
        ranks: ranks of this node's workers, by local rank.
        report: receives events.
    """

    def __init__(
        self, store: Store, node: int, peers: Collection[int], ranks: Mapping[int, int], report: Report
    ) -> None:
        self.peers = tuple(peers)
        self.ranks = dict(ranks)
        self._store = store
        self._node = node
        self._report = report
        self._is_lost = False
        self._fits: dict[int, int] = {}
        self._counted: set[str] = set()
        self._published = ""

    @property
    def is_shared(self) -> bool:
        """Whether workers of other nodes train with those of this one."""
        return len(self.peers) > 1

    # ------------------------------------------------------------------ ends

    def have_all_ended(self, regrouping: int, ended: Mapping[int, AtEnd]) -> bool:
        """Publish that all workers of this node have completed their last step; returns whether all nodes have.

        Args:
            regrouping: number of the regrouping that they belong to.
            ended: where they ended, by rank.
        """
        fit = self._fits.get(regrouping, 0)

        def ask() -> bool:
            if (count := _ENDED.format(regrouping, fit)) not in self._counted:
                self._store.compare_set(_END.format(regrouping, fit), "", _encode_ends(ended))
            return self._count(count) >= len(self.peers)

        return not self.is_shared or self._answer(ask, otherwise=False)

    def leave(self, regrouping: int) -> None:
        """Record that the workers of this node leave the training loop, as those of all nodes do."""
        self._fits[regrouping] = self._fits.get(regrouping, 0) + 1

    def first_ended(self, regrouping: int) -> dict[int, AtEnd]:
        """Return the last steps of the workers of the first node that published them, by rank; empty if none has.

        Args:
            regrouping: number of the regrouping that this node's workers belong to.
        """
        found = self._read(_END.format(regrouping, self._fits.get(regrouping, 0)), _ENDS)
        return {} if found is None else dict(found["ranks"])

    # ------------------------------------------------------------------ silent workers

    def by_rank(self, progress: Mapping[int, RankProgress]) -> dict[int, RankProgress]:
        """Convert progress by local rank to progress by rank."""
        return {self.ranks[local]: progress for local, progress in progress.items()}

    def exchange(self, progress: Mapping[int, RankProgress], now: float) -> dict[int, RankProgress]:
        """Publish the positions of this node's silent workers, and read those of the other nodes.

        Args:
            progress: progress of this node's workers, by local rank.
            now: time on the clock of the progress.

        Returns:
            Progress of the other nodes by rank, on the clock of this node; empty unless the workers of all nodes are
                silent.
        """
        others = [_SILENT.format(node) for node in self.peers if node != self._node]

        def ask() -> list[bytes]:
            self._published = _encode_progress(self.by_rank(progress), now)
            self._store.set(_SILENT.format(self._node), self._published)
            return self._store.multi_get(others) if self._store.check(others) else []

        found: dict[int, RankProgress] = {}
        nothing: list[bytes] = []
        for key, said in zip(others, self._answer(ask, otherwise=nothing), strict=False):
            if (decoded := self._decoded(key, said, _PROGRESS)) is None:
                return {}
            found |= {rank: replace(progress, at=now + progress.at) for rank, progress in decoded["ranks"].items()}
        return found

    def withdraw(self) -> None:
        """Withdraw the published positions: a worker of this node makes progress again."""
        if self._published:
            self._answer(lambda: self._store.set(_SILENT.format(self._node), ""), otherwise=None)
            self._published = ""

    # ------------------------------------------------------------------ the reason to end

    def settle(self, reason: str) -> str:
        """Publish why no rank can continue; returns the first reason that any node has published."""
        mine = json.dumps({"reason": reason})
        said = (
            self._answer(lambda: self._store.compare_set(_UNEVEN, "", mine), otherwise=b"") if self.is_shared else b""
        )
        decoded = self._decoded(_UNEVEN, said, _REASON)
        return reason if decoded is None else str(decoded["reason"])

    def settled(self) -> str:
        """Return why no rank can continue, as found by another node; empty if none has."""
        found = self._read(_UNEVEN, _REASON) if self.is_shared else None
        return "" if found is None else str(found["reason"])

    def all_know(self) -> bool:
        """Record that this node knows the reason; returns whether all nodes do, as far as that can be determined."""
        return not self.is_shared or self._answer(lambda: self._count(_KNOWN) >= len(self.peers), otherwise=True)

    def all_have_finished(self) -> bool:
        """Record that the workers of this node have succeeded; returns whether those of all nodes have."""
        return not self.is_shared or self._answer(lambda: self._count(_FINISHED) >= len(self.peers), otherwise=True)

    # ------------------------------------------------------------------ the store

    def _count(self, key: str) -> int:
        """Return how many nodes have been counted under a key, this one included."""
        amount = 0 if key in self._counted else 1
        self._counted.add(key)
        return self._store.add(key, amount)

    def _read(self, key: str, check: Check) -> Any:
        said = self._answer(lambda: self._store.get(key) if self._store.check([key]) else b"", otherwise=b"")
        return self._decoded(key, said, check)

    def _answer(self, question: Callable[[], Answer], *, otherwise: Answer) -> Answer:
        if self._is_lost:
            return otherwise
        try:
            return question()
        except DistError:
            self._is_lost = True
            return otherwise

    def _decoded(self, key: str, said: bytes, check: Check) -> Any:
        """Return what another agent has published; None if that is nothing or unreadable."""
        if not said:
            return None
        try:
            return check(parse(said), "")
        except SchemaError as error:
            self._report(EntryIgnored(key, error))
            return None


def _encode_ends(ended: Mapping[int, AtEnd]) -> str:
    return json.dumps({"ranks": {rank: {"step": end.step, "why": end.why} for rank, end in ended.items()}})


def _encode_progress(progress: Mapping[int, RankProgress], now: float) -> str:
    ranks = {
        rank: {
            "step": progress.step,
            "point": progress.point,
            "count": progress.count,
            "silent_s": max(0.0, now - progress.at),
            "longest_pause_s": progress.longest_pause_s,
            "stopped": progress.stopped,
            "traced": progress.traced,
            "epoch": progress.epoch,
            "out_of_data": progress.out_of_data,
            "waits": progress.waits,
            "idle_s": progress.idle_s,
        }
        for rank, progress in progress.items()
    }
    return json.dumps({"ranks": ranks})
