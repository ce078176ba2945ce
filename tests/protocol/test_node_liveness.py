"""Node liveness: how an agent interprets silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.node_liveness import (
    AllAlive,
    Bound,
    Finding,
    Heard,
    Liveness,
    NodesLost,
    Partitioned,
    judge,
    longest_pause_s,
    watched_by,
)

BOUND = Bound(2.0, 3)


NOW = 100.0


def after(
    silent_s: float, *, own_s: float = 0.0, looked_s: float = 0.4, closed_s: float | None = None, pause_s: float = 0.6
) -> Finding:
    """The finding when node 3 and the rendezvous have been silent, and its connection closed, for these seconds."""
    silent = Heard(NOW - silent_s, None if closed_s is None else NOW - closed_s, pause_s)
    liveness = Liveness(NOW - looked_s, NOW - own_s, {3: silent, 0: Heard(NOW - 1)})
    return judge(liveness, BOUND, now=NOW, endpoint="head:29400")


def test_the_bounds() -> None:
    assert (BOUND.partitioned_s, BOUND.lost_s) == (6.0, 8.0)


@pytest.mark.parametrize(("silent_s", "own_s"), [(0, 0), (7.9, 0), (5.9, 5.9)])
def test_silence_within_the_limit_is_tolerated(silent_s: float, own_s: float) -> None:
    assert after(silent_s, own_s=own_s) == AllAlive()


def test_another_node_is_lost() -> None:
    found = after(8.1)
    assert isinstance(found, NodesLost)
    assert found.nodes == (3,)
    assert found.silent_s == pytest.approx(8.1)
    assert found.reason == (
        "node 3 of the round has been silent for 8.1 s, limit 8 s (keep_alive_interval=2 x "
        "keep_alive_max_attempt=3, plus one interval)"
    )


def test_a_closed_connection_shortens_the_silence_that_is_required() -> None:
    assert after(1.1, closed_s=1.0) == AllAlive()
    found = after(1.3, closed_s=1.0)
    assert isinstance(found, NodesLost) and found.nodes == (3,)
    assert found.reason == (
        "node 3 of the round has been silent for 1.3 s, limit 1.2 s (its agent's connection was closed; its "
        "heartbeats were at most 0.60 s apart)"
    )
    assert after(1.3) == AllAlive()


def test_a_closed_connection_means_nothing_while_heartbeats_arrive() -> None:
    assert after(0.1, closed_s=5.0) == AllAlive()
    # The connection was closed while the node lived on: from now on its silence counts as any other's.
    assert after(7.9, closed_s=20.0) == AllAlive()


@given(st.floats(0, 100), st.floats(0, 60), st.floats(0, 60))
def test_the_required_silence_is_never_longer_than_without_a_closed_connection(
    silent_s: float, closed_s: float, pause_s: float
) -> None:
    assert 1.0 <= BOUND.closed_s(pause_s) <= BOUND.lost_s
    if silent_s > BOUND.lost_s:
        assert isinstance(after(silent_s, closed_s=closed_s, pause_s=pause_s), NodesLost)
    if silent_s <= max(1.0, min(2 * pause_s, BOUND.lost_s)):
        assert after(silent_s, closed_s=closed_s, pause_s=pause_s) == AllAlive()


def test_an_agent_that_is_not_answered_considers_no_other_node_lost() -> None:
    """Its own silence could not tell it of their heartbeats."""
    assert after(6.0, own_s=5.9, closed_s=5.9) == AllAlive()


def test_nodes_that_seem_to_be_dead_are_lost_together() -> None:
    def found(first_s: float, second_s: float, closed_at: float | None = NOW - 1.0) -> Finding:
        heard = {3: Heard(NOW - first_s, NOW - 1.0, 0.6), 4: Heard(NOW - second_s, closed_at, 0.6)}
        return judge(Liveness(NOW - 0.1, NOW, heard), BOUND, now=NOW, endpoint="head:29400")

    assert found(1.3, 1.1) == AllAlive(), "the second one is not decided on yet"
    assert getattr(found(1.3, 1.3), "nodes", ()) == (3, 4)
    assert getattr(found(1.3, 1.1, None), "nodes", ()) == (3,)


def test_the_longest_pause_needs_some_pauses() -> None:
    assert longest_pause_s([0.5] * 9) == 0.0
    assert longest_pause_s([0.5] * 9 + [0.8]) == 0.8


def test_without_an_answer_this_node_is_partitioned() -> None:
    found = after(60.0, own_s=6.1)
    assert isinstance(found, Partitioned)
    assert found.reason.startswith("the rendezvous at head:29400 has not answered for 6.1 s, limit 6 s")


def test_a_suspended_agent_does_not_consider_others_lost() -> None:
    assert after(60.0, own_s=60.0, looked_s=59.0) == AllAlive()


@given(st.integers(2, 12), st.data())
def test_every_loss_is_noticed_by_a_live_node(nodes: int, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.integers(0, nodes - 1), min_size=1, max_size=nodes - 1))
    living = set(range(nodes)) - lost
    assert any(lost & set(watched_by(node, nodes)) for node in living)


@given(st.integers(2, 12))
def test_all_nodes_watch_the_node_that_hosts_the_workers_store(nodes: int) -> None:
    assert all(0 in watched_by(node, nodes) for node in range(1, nodes))
    assert all(node not in watched_by(node, nodes) and len(watched_by(node, nodes)) <= 3 for node in range(nodes))
