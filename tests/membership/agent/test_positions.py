"""Agents publish the last steps and the positions of their workers, over a real store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch.distributed import DistStoreError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.protocol.hang_detection import Point, RankProgress, find_hang
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded, find_uneven, out_of_data

AHEAD = RankProgress(
    step=13, point=Point.BACKWARD, count=0, at=95.0, longest_pause_s=0.5, own_s=0.0, epoch=1, waits=True
)
DONE = replace(AHEAD, step=12, point=Point.COMMIT, at=94.0, out_of_data=True)
END = AtEnd(12, WhyEnded.NO_DATA)

Join = Callable[..., Positions]


@pytest.fixture(scope="module")
def server() -> TCPStore:
    """A store for all tests."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def store(server: TCPStore, request: pytest.FixtureRequest) -> PrefixStore:
    """What the agents of one test share."""
    return PrefixStore(request.node.name, server)


@pytest.fixture
def join(store: PrefixStore) -> Join:
    """Makes what the agent of a node sees; of two nodes with two ranks each."""

    def make(node: int, peers: tuple[int, ...] = (0, 1)) -> Positions:
        return Positions(store, node, peers, {0: 2 * node, 1: 2 * node + 1}, print)

    return make


def test_nodes_have_ended_when_the_last_one_has(join: Join) -> None:
    first, second = join(0), join(1)
    assert not first.have_all_ended(0, {0: END, 1: END})
    assert not first.have_all_ended(0, {0: END, 1: END}), "a node counts once"
    assert second.have_all_ended(0, {2: END, 3: END})
    assert first.have_all_ended(0, {0: END, 1: END})


def test_a_node_that_trains_alone_asks_no_other() -> None:
    alone = Positions(None, 3, (3,), {0: 5}, print)  # type: ignore[arg-type]
    assert alone.have_all_ended(0, {5: END})
    assert alone.settle("why") == "why"
    assert alone.all_know()
    assert alone.settled() == ""


def test_a_node_that_is_ahead_finds_the_one_that_has_ended(join: Join) -> None:
    first, second = join(0), join(1)
    assert first.first_ended(0) == {}
    second.have_all_ended(0, {2: END, 3: END})
    ended = first.first_ended(0)
    assert ended == {2: END, 3: END}
    found = find_uneven(ended, first.by_rank({0: AHEAD, 1: AHEAD}))
    assert found is not None and found.startswith("rank 2 ran out of training data after step 12, ranks 0, 1 did not")


def test_ends_before_a_fault_or_of_an_earlier_fit_do_not_count(join: Join) -> None:
    first, second = join(0), join(1)
    second.have_all_ended(0, {2: END})
    assert first.first_ended(1) == {}, "the ranks have regrouped since"
    assert first.have_all_ended(0, {0: END})
    first.leave(0)
    second.leave(0)
    assert first.first_ended(0) == {}, "that is another fit"
    assert not first.have_all_ended(0, {0: END})
    assert second.have_all_ended(0, {2: END})


def test_silent_ranks_are_known_when_all_nodes_are_silent(join: Join) -> None:
    first, second = join(0), join(1)
    assert first.exchange({0: AHEAD, 1: AHEAD}, now=100.0) == {}
    # The clock of the other node is another one.
    assert second.exchange({0: replace(DONE, at=1994.0)}, now=2000.0) == {
        0: replace(AHEAD, at=1995.0),
        1: replace(AHEAD, at=1995.0),
    }
    elsewhere = first.exchange({0: AHEAD, 1: AHEAD}, now=107.0)
    assert elsewhere == {2: replace(DONE, at=101.0)}
    second.withdraw()
    assert first.exchange({0: AHEAD, 1: AHEAD}, now=108.0) == {}


def test_a_lagging_rank_is_found_among_the_ranks_of_all_nodes(join: Join) -> None:
    first, second = join(0), join(1)
    behind = replace(AHEAD, point=Point.BATCH, waits=False)
    first.exchange({0: AHEAD, 1: AHEAD}, now=110.0)
    everyone = second.by_rank({0: AHEAD, 1: behind}) | second.exchange({0: AHEAD, 1: behind}, now=110.0)
    hang = find_hang(everyone, now=110.0)
    assert hang is not None and hang.ranks == (3,)


def test_an_epoch_that_ends_on_one_node_only_is_found(join: Join) -> None:
    first, second = join(0), join(1)
    second.exchange({0: DONE}, now=100.0)
    everyone = first.by_rank({0: AHEAD}) | first.exchange({0: AHEAD}, now=100.0)
    assert out_of_data(everyone) == {2: END}


def test_all_nodes_report_the_reason_that_was_published_first(join: Join) -> None:
    first, second = join(0), join(1)
    assert second.settled() == ""
    assert first.settle("rank 2 ran out") == "rank 2 ran out"
    assert not first.all_know()
    assert second.settle("rank 3 ran out") == second.settled() == "rank 2 ran out"
    assert second.all_know()
    assert first.all_know()


@pytest.mark.parametrize("said", ["{", '{"ranks": {"2": {"step": -5}}}', '{"ranks": {"x": {}}}', "[]"])
def test_unreadable_data_is_ignored(said: str, store: PrefixStore, join: Join) -> None:
    first = join(0)
    store.set("ckptless/silent/1", said)
    store.set("ckptless/end/0/0", said)
    store.set("ckptless/uneven", said)
    assert first.exchange({0: AHEAD}, now=100.0) == {}
    assert first.first_ended(0) == {}
    assert first.settled() == ""


class LostStore:
    """A store whose node is lost."""

    asked = 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        def ask(*_: object) -> object:
            self.asked += 1
            raise DistStoreError("connection was reset")

        return ask


def test_a_lost_store_delays_no_agent_and_is_not_asked_again() -> None:
    store = LostStore()
    first = Positions(store, 0, (0, 1), {0: 0}, print)  # type: ignore[arg-type]
    assert not first.have_all_ended(0, {0: END}), "the rendezvous detects whether the other nodes have ended"
    assert first.first_ended(0) == {}
    assert first.exchange({0: AHEAD}, now=100.0) == {}
    assert first.settle("why") == "why"
    assert first.all_know()
    assert store.asked == 1
