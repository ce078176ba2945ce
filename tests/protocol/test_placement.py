"""Placement of shards, checked against enumeration and known values."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.placement import Placement, _survivals_of_circle, fail_together, place

# domains, copies in total, losses -> probability with groups (and a ring for the rest), with one ring alone
KNOWN = {
    (8, 2, 2): (0.857, 0.714),
    (8, 2, 3): (0.571, 0.286),
    (8, 2, 4): (0.229, 0.029),
    (8, 2, 6): (0.0, 0.0),
    (16, 2, 2): (0.9333, 0.8667),
    (16, 2, 3): (0.8, 0.6286),
    (16, 2, 4): (0.6154, 0.3626),
    (16, 2, 6): (0.2238, 0.042),
    (16, 2, 8): (0.0199, 0.0002),
    (128, 2, 2): (0.9921, 0.9843),
    (128, 2, 3): (0.9764, 0.9531),
    (128, 2, 4): (0.9529, 0.9077),
    (128, 2, 6): (0.8847, 0.7819),
    (128, 2, 8): (0.7925, 0.6269),
    (512, 2, 2): (0.998, 0.9961),
    (512, 2, 3): (0.9941, 0.9883),
    (512, 2, 4): (0.9883, 0.9767),
    (512, 2, 6): (0.9708, 0.9424),
    (512, 2, 8): (0.946, 0.8948),
    (2048, 2, 2): (0.9995, 0.999),
    (2048, 2, 3): (0.9985, 0.9971),
    (2048, 2, 4): (0.9971, 0.9941),
    (2048, 2, 6): (0.9927, 0.9854),
    (2048, 2, 8): (0.9864, 0.9729),
    (12, 3, 2): (1.0, 1.0),
    (12, 3, 3): (0.9818, 0.9455),
    (12, 3, 4): (0.9273, 0.8061),
    (12, 3, 6): (0.6429, 0.3052),
    (12, 3, 8): (0.1636, 0.0061),
    (48, 3, 2): (1.0, 1.0),
    (48, 3, 3): (0.9991, 0.9972),
    (48, 3, 4): (0.9963, 0.9891),
    (48, 3, 6): (0.9815, 0.9483),
    (48, 3, 8): (0.9485, 0.8639),
    (16, 4, 2): (1.0, 1.0),
    (16, 4, 3): (1.0, 1.0),
    (16, 4, 4): (0.9978, 0.9912),
    (16, 4, 6): (0.967, 0.8901),
    (16, 4, 8): (0.8466, 0.5941),
    (5, 2, 2): (0.6, 0.5),
    (5, 2, 3): (0.0, 0.0),
    (7, 2, 2): (0.762, 0.667),
    (7, 2, 3): (0.343, 0.2),
    (7, 2, 4): (0.0, 0.0),
    (11, 3, 2): (1.0, 1.0),
    (11, 3, 3): (0.9576, 0.9333),
    (11, 3, 4): (0.8455, 0.7667),
}


@st.composite
def worlds(draw: st.DrawFn, most_domains: int = 7) -> tuple[list[str], int]:
    """Domains of unequal sizes in any rank order, and a number of copies that fits them."""
    count = draw(st.integers(1, most_domains))
    sizes = [draw(st.integers(1, 3)) for _ in range(count)]
    domains = draw(st.permutations([f"n{d}" for d, size in enumerate(sizes) for _ in range(size)]))
    return domains, draw(st.integers(0, count - 1))


def enumerated_survival(placement: Placement, losses: int) -> float:
    names = sorted(set(placement.domains))
    cases = list(combinations(names, losses))
    kept = sum(all(set(row.domains) - set(lost) for row in placement.rows()) for lost in cases)
    return kept / len(cases)


def one_per_domain(count: int) -> list[str]:
    return [f"n{d}" for d in range(count)]


@given(worlds())
def test_a_shard_is_kept_by_as_many_other_domains_as_there_are_copies(world: tuple[list[str], int]) -> None:
    domains, copies = world
    for row in place(domains, copies).rows():
        assert len(row.holders) == copies
        assert len(set(row.domains)) == copies + 1


@given(worlds())
def test_survival_probability_matches_enumeration(world: tuple[list[str], int]) -> None:
    placement = place(*world)
    for losses in range(len(set(placement.domains)) + 1):
        assert placement.survival_probability(losses) == pytest.approx(
            enumerated_survival(placement, losses), abs=1e-12
        )


@st.composite
def racks(draw: st.DrawFn) -> tuple[list[str], list[str], int]:
    """Ranks on nodes, one to three each, and nodes in racks of unequal size, in any order."""
    rack_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    nodes = [(f"n{rack}.{n}", f"r{rack}") for rack, size in enumerate(rack_sizes) for n in range(size)]
    ranks = [place for place in draw(st.permutations(nodes)) for _ in range(draw(st.integers(1, 3)))]
    return [node for node, _ in ranks], [rack for _, rack in ranks], draw(st.integers(0, len(rack_sizes) - 1))


@given(racks())
def test_survival_probability_of_racks_matches_enumeration_over_their_nodes(
    world: tuple[list[str], list[str], int],
) -> None:
    nodes, domains, copies = world
    placement = place(domains, copies, kind="rack")
    nodes_of = {rack: {node for node, of in zip(nodes, domains, strict=True) if of == rack} for rack in set(domains)}
    holders = [{nodes[rank] for rank in (shard, *holders)} for shard, holders in enumerate(placement.holders)]
    for losses in range(len(nodes_of) + 1):
        cases = [set[str]().union(*(nodes_of[rack] for rack in lost)) for lost in combinations(nodes_of, losses)]
        survived = sum(all(held - lost for held in holders) for lost in cases)
        assert placement.survival_probability(losses) == pytest.approx(survived / len(cases), abs=1e-12)


@given(worlds())
def test_a_loss_is_fatal_if_it_contains_a_fatal_loss(world: tuple[list[str], int]) -> None:
    placement = place(*world)
    names = sorted(set(placement.domains))
    fatal = [set(losses) for losses in placement.fatal_losses()]
    for lost in (set(case) for count in range(len(names) + 1) for case in combinations(names, count)):
        is_survived = all(set(row.domains) - lost for row in placement.rows())
        assert is_survived == (not any(losses <= lost for losses in fatal))


@given(worlds(), st.data())
def test_exactly_the_domains_that_fail_together_are_joined(world: tuple[list[str], int], data: st.DataObject) -> None:
    domains, _ = world
    ranks = st.integers(0, len(domains) - 1)
    groups = data.draw(st.lists(st.sets(ranks, min_size=1, max_size=4), max_size=4))
    joined = fail_together(domains, groups)
    # By brute force: what is reached from a rank over domains and groups.
    for rank in range(len(domains)):
        reached = {rank}
        while True:
            more = {r for r in range(len(domains)) if domains[r] in {domains[m] for m in reached}}
            more |= set[int]().union(*(group for group in groups if group & more))
            if more == reached:
                break
            reached = more
        assert {r for r in range(len(domains)) if joined[r] == joined[rank]} == reached


@given(worlds(), st.data())
def test_no_copy_is_kept_by_a_rank_that_is_lost_with_the_writer(
    world: tuple[list[str], int], data: st.DataObject
) -> None:
    domains, copies = world
    ranks = st.integers(0, len(domains) - 1)
    groups = data.draw(st.lists(st.sets(ranks, min_size=1, max_size=4), max_size=3))
    joined = fail_together(domains, groups)
    placement = place(joined, min(copies, len(set(joined)) - 1))
    for shard, holders in enumerate(placement.holders):
        lost_with_it = set[int]().union(*(group for group in groups if shard in group))
        assert not (lost_with_it - {shard}) & set(holders)


def test_domains_that_are_joined_have_both_names() -> None:
    assert fail_together(["b", "b", "a", "a", "c"], [(1, 2)]) == ("b+a", "b+a", "b+a", "b+a", "c")


@given(worlds())
def test_sources_are_the_inverse_of_holders(world: tuple[list[str], int]) -> None:
    placement = place(*world)
    for rank in range(len(placement.domains)):
        for shard, holders in enumerate(placement.holders):
            assert (shard in placement.sources(rank)) == (rank in holders)


@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 4))
def test_equal_domains_keep_equally_many_copies(domain_count: int, ranks_each: int, copies: int) -> None:
    copies = min(copies, domain_count - 1)
    placement = place([f"n{d}" for d in range(domain_count) for _ in range(ranks_each)], copies)
    assert {len(placement.sources(rank)) for rank in range(domain_count * ranks_each)} == {copies}


@pytest.mark.parametrize(("world", "expected"), KNOWN.items())
def test_known_values(world: tuple[int, int, int], expected: tuple[float, float]) -> None:
    count, total_copies, losses = world
    digits = 3 if count < 9 else 4
    with_groups = place(one_per_domain(count), total_copies - 1).survival_probability(losses)
    with_one_ring = _survivals_of_circle(count, total_copies, losses) / comb(count, losses)
    assert (round(with_groups, digits), round(with_one_ring, digits)) == expected


def test_groups_that_divide_the_domains_evenly() -> None:
    placement = place(["a", "a", "b", "b", "c", "c", "d", "d"], 1)
    assert placement.circles == (("a", "b"), ("c", "d"))
    assert placement.holders == ((2,), (3,), (0,), (1,), (6,), (7,), (4,), (5,))
    assert placement.sources(0) == (2,)
    assert placement.reason == (
        "8 shards, 2 copies each over 4 nodes in groups of 2: survives any node loss, 2 at once with probability 0.667"
    )


def test_groups_and_a_ring_otherwise() -> None:
    placement = place(one_per_domain(5), 1, kind="rank")
    assert placement.holders == ((1,), (0,), (3,), (4,), (2,))
    assert placement.reason == (
        "5 shards, 2 copies each over 5 ranks in groups of 2 and a ring of 3: "
        "survives any rank loss, 2 at once with probability 0.600"
    )


def test_two_copies_on_a_ring_alone() -> None:
    placement = place(one_per_domain(4), 2)
    assert placement.holders == ((1, 2), (2, 3), (3, 0), (0, 1))
    assert placement.reason.endswith(
        "in a ring of 4: survives any 2 simultaneous node losses, 3 at once with probability 0.000"
    )


def test_ranks_of_a_small_domain_keep_several_shards() -> None:
    placement = place(["a", "a", "a", "b"], 1)
    assert placement.holders == ((3,), (3,), (3,), (0,))
    assert placement.rows()[1] == (1, 1, (3,), ("a", "b"))


def test_the_reason_says_that_a_single_domain_is_not_covered() -> None:
    placement = place(["a"] * 4, 1)
    assert placement.holders == ((), (), (), ())
    assert placement.survival_probability(0) == 1.0
    assert placement.survival_probability(1) == 0.0
    assert placement.reason == "4 shards, 1 copy each on 1 node: a node loss is not covered (copies=1 needs 2 nodes)"


def test_no_copies_survive_no_loss() -> None:
    placement = place(["a", "b"], 0)
    assert placement.survival_probability(1) == 0.0
    assert placement.reason == "2 shards, 1 copy each over 2 nodes: survives no node loss"


def test_too_few_domains_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(OptionsError) as caught:
        place(["a", "a", "b", "b"], 2)
    assert str(caught.value) == (
        "copies=2 needs 3 nodes (the writer's own and 2 more), but the 4 ranks are on 2: set copies=1 or add 1 node"
    )


def test_survival_of_more_losses_than_domains_is_refused() -> None:
    with pytest.raises(OptionsError, match="3 losses: expected 0 to 2"):
        place(["a", "b"], 1).survival_probability(3)
