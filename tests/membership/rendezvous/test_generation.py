"""Generation numbers: every order of arrival, every point at which the last membership may have died."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.rendezvous.generation import Generation, join_generation, skip_generations

TIMEOUT_S = 30.0


def join_all(stores: list[Store], order: list[int]) -> list[Generation]:
    """All ranks join, each started when those before it in `order` have been started."""
    with ThreadPoolExecutor(len(stores)) as pool:
        joining = {rank: pool.submit(join_generation, stores[rank], rank, len(stores), TIMEOUT_S) for rank in order}
        return [joining[rank].result() for rank in range(len(stores))]


def leave_debris(store: Store, world_size: int, stage: int) -> None:
    """What a membership leaves in a store when it dies after so many of its writes."""
    number = store.add("ckptless/generations", 1)
    hellos = [(f"ckptless/{number}/hello/{rank}", f"dead-{rank}") for rank in range(world_size)]
    go = [(f"ckptless/{number}/go/{rank}", nonce) for rank, (_, nonce) in enumerate(hellos)]
    for key, value in [("ckptless/current", str(number)), *hellos, *go, ("address/0", "gone")][:stage]:
        store.set(key, value)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), world_size=st.integers(1, 4))
def test_all_ranks_get_one_new_number(data: st.DataObject, world_size: int) -> None:
    store = HashStore()
    deaths = data.draw(st.lists(st.integers(0, 2 * world_size + 2), max_size=3))
    for stage in deaths:
        leave_debris(store, world_size, stage)
    numbers = [len(deaths)]
    for _ in range(2):
        generations = join_all([store] * world_size, data.draw(st.permutations(range(world_size))))
        assert len({generation.number for generation in generations}) == 1
        numbers.append(generations[0].number)
        generations[0].store.set("address", "new")
        assert all(generation.store.get("address") == b"new" for generation in generations)
        assert not any(generation.store.check(["address/0"]) for generation in generations)
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_tcp_store(order: list[int]) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients: list[Store] = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
    assert [{g.number for g in join_all(clients, order)} for _ in range(3)] == [{1}, {2}, {3}]


def test_an_early_rank_abandons_the_number_of_a_dead_membership() -> None:
    """It has said hello under the number of a dead membership when the new rank 0 arrives."""
    store = HashStore()
    leave_debris(store, 2, stage=2)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(join_generation, store, 1, 2, TIMEOUT_S)
        store.wait(["ckptless/1/hello/1"], timedelta(seconds=TIMEOUT_S))
        assert join_generation(store, 0, 2, TIMEOUT_S).number == 2
        assert early.result().number == 2


def test_a_number_published_late_by_a_dying_process_only_delays() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        lead = pool.submit(join_generation, store, 0, 2, TIMEOUT_S)
        store.wait(["ckptless/1/hello/0"], timedelta(seconds=TIMEOUT_S))
        store.set("ckptless/current", str(store.add("ckptless/generations", 1)))
        follow = pool.submit(join_generation, store, 1, 2, TIMEOUT_S)
        assert lead.result().number == follow.result().number == 3


def test_a_number_accepted_by_all_holds_though_another_was_published_since() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        follow = pool.submit(join_generation, store, 1, 2, TIMEOUT_S)
        store.add("ckptless/generations", 1)
        store.set("ckptless/current", "1")
        store.wait(["ckptless/1/hello/1"], timedelta(seconds=TIMEOUT_S))
        said = store.get("ckptless/1/hello/1").decode()
        store.set("ckptless/current", "7")
        store.wait(["ckptless/7/hello/1"], timedelta(seconds=TIMEOUT_S))
        store.set("ckptless/1/go/1", said)
        assert follow.result().number == 1


@pytest.mark.parametrize(("rank", "missing"), [(0, "ranks 1, 2"), (1, "rank 0 ")])
def test_missing_ranks_are_named(rank: int, missing: str) -> None:
    with pytest.raises(TransportError, match=f"rank {rank} waited 0.05 s for all 3 ranks to join; {missing}"):
        join_generation(HashStore(), rank, 3, 0.05)


def test_numbers_can_continue_in_another_store() -> None:
    store = HashStore()
    skip_generations(store, 4)
    assert join_generation(store, 0, 1, TIMEOUT_S).number == 5


def test_the_loss_of_the_store_is_reported() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False)
    del server
    with pytest.raises(TransportError, match="rank 1: lost the store of the rendezvous of 2 ranks"):
        join_generation(client, 1, 2, TIMEOUT_S)
