"""Data that some ranks have reaches those that lack it, in few rounds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.replica.broadcast import broadcast, plan_broadcast
from lightning_ckptless.replica.transport import LoopbackTransport


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_every_rank_that_lacks_it_receives_once_from_one_that_has_it(has: list[bool]) -> None:
    having = {rank for rank, there in enumerate(has) if there}
    for pairs in plan_broadcast(has):
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
        assert all(source in having and target not in having for source, target in pairs)
        having |= {target for _, target in pairs}
    assert having == (set(range(len(has))) if any(has) else set())


def test_one_rank_reaches_thousands_in_a_round_for_each_doubling() -> None:
    assert len(plan_broadcast([True] + [False] * 8191)) == ceil(log2(8192))
    assert plan_broadcast([True] * 8192) == []


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_all_ranks_have_it_afterwards(has: list[bool]) -> None:
    lengths = [4 * there for there in has]
    with ThreadPoolExecutor(len(has)) as pool:
        transports = LoopbackTransport.world(len(has))
        got = pool.map(lambda t: broadcast(t, lengths, b"data" if has[t.rank] else b""), transports)
        assert set(got) == {b"data" if any(has) else b""}
