"""The reported growth with the number of ranks, measured and modelled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import projection, scale
from benchmarks.model import bare_world, modelled_rank
from benchmarks.model.modelled_rank import regroup, restore, vote, world_of
from benchmarks.model.network import Network

NETWORK = Network(
    hop_s=1e-4, crowded_hop_s=2e-4, byte_s=1e-9, message_cpu_s=1e-5, turn_cpu_s=1e-4, shared_s=1e-6,
    group_s=1e-3, connect_cpu_s=1e-4, request_s=1e-5, ranks_per_node=8, cores_per_node=8,
)  # fmt: skip


def row(ranks: int, fds: float) -> dict[str, Any]:
    use, traffic = {"fds": fds, "threads": 9, "uss_mib": 50.0}, {"messages": 3.0, "message bytes": 64_000.0 / ranks}
    phases = {"regroup_s": 0.01 * ranks, "restore_s": 0.02 * ranks, "replay_s": 0.1}
    kill = {"seconds": 0.5, "survivor_cpu_s": [0.02, 0.04], "ledger": {"phases": phases}}
    parts = {"round_s": [0.02], "exchange_s": [0.01], "vote_s": [0.01]}
    lists = {"use": [use], "traffic": [traffic], "kills": [kill, {"failed": "lost"}]}
    return {"ranks": ranks, "start_s": 5.0, "step_s": 0.1, **parts, **lists}


def test_the_tables_of_a_measurement() -> None:
    times, use = scale.Scale().tables({"worlds": [row(8, 41), row(16, 57)]})
    assert (
        "| 8 | 5.0 | 0.100 | 20.0 | 10.0 | 10.0 | 1 of 2 | 0.50 | 0.080 | 0.160 | 0.100 | 0.030 |" in times.markdown()
    )
    assert "| 16 | 57 | 9 | 50.0 | 3 | 4000 |" in use.markdown()


def test_traffic_is_counted_between_two_reports() -> None:
    before, after = ({"rounds_s": {"round": [0.1] * 5}, "counts": {"messages": count}} for count in (7, 22))
    assert scale.traffic_of(before, after) == {"messages": 3.0}


def test_a_model_that_is_calibrated_on_its_own_figures_agrees() -> None:
    def figures(ranks: int) -> dict[str, dict[str, float]]:
        one = replace(NETWORK, cores_per_node=2).one_machine(ranks)
        costs = {
            "vote": one.ring_vote(ranks),
            "gather": one.gather(ranks, modelled_rank.PAGE_BYTES),
            "group": one.mesh(ranks),
            "small exchange": one.exchange(ranks, 1, bare_world.SMALL_BYTES),
            "large exchange": one.exchange(ranks, 1, bare_world.LARGE_BYTES),
        }
        requests = {"wall_s": ranks * bare_world.REQUESTS * NETWORK.request_s, "bytes": 0.0}
        return {"requests": requests} | {
            name: {"wall_s": cost.seconds, "bytes": cost.sent_bytes} for name, cost in costs.items()
        }

    bare = {ranks: figures(ranks) for ranks in projection.COMPARED}
    here = projection.calibrate(bare, cores=2)
    assert here.hop_s == pytest.approx(NETWORK.hop_s, rel=0.01)
    assert here.connect_cpu_s == pytest.approx(NETWORK.connect_cpu_s, rel=0.01)
    votes = [each for each in projection.comparison(bare, here) if each["call"] in ("vote", "gather", "group")]
    assert all(projection.agrees(each) for each in votes)


def test_votes_of_one_rank_per_node_grow_with_the_nodes_and_by_doubling_with_their_logarithm() -> None:
    few, many = ((NETWORK.nodes(n), n) for n in (512, 8192))
    ring = [vote(NETWORK, n, NETWORK.node_vote).cost.seconds for _, n in (few, many)]
    doubling = [vote(NETWORK, n, NETWORK.doubling_vote).cost.seconds for _, n in (few, many)]
    assert ring[1] / ring[0] == pytest.approx(many[0] / few[0], rel=0.1)
    assert doubling[1] / doubling[0] < 2


def test_one_rank_of_a_large_world_runs_the_protocol() -> None:
    """It receives every shard that its node does not have, once, and its messages grow no faster than the ranks."""
    worlds = {ranks: world_of(ranks, 8, ranks * 4096) for ranks in (64, 512)}
    found = {ranks: (regroup(NETWORK, world, 9), restore(NETWORK, world, 9)) for ranks, world in worlds.items()}
    for before, after in zip(found[64], found[512], strict=True):
        assert 1 < after.cost.messages / before.cost.messages < 9
