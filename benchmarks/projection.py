"""What a vote, a regroup and a restore take with 64 to 8,192 ranks: the real decisions, and a model of the network.

First, small worlds of processes on this machine calibrate the model, and larger ones are compared with it. Then one
rank of each large world runs the protocol's own code, and the model prices its messages by the algorithms of gloo. The
network and the nodes of the large worlds are options; by default a hop takes as long as on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.table import Column, Table
from benchmarks.model.bare_world import LARGE_BYTES, REQUESTS, SMALL_BYTES, Figures, measure_bare_world
from benchmarks.model.modelled_rank import PAGE_BYTES, Phase, regroup, restore, vote, world_of
from benchmarks.model.network import Cost, Network

CALIBRATED = (8, 32)
"""Numbers of ranks that the model is fitted to; the others are predicted."""
COMPARED, QUICK_COMPARED = (2, 4, 8, 16, 32, 64), (2, 4, 16)
CORES, CORES_PER_NODE = 2, 64
"""Of this machine, and of a node of a large world."""
TOLERANCE = 0.25
SHARED_S = 2e-6
"""Not calibrated: a flag in shared memory is seen by another core within a microsecond or two."""
_US, _GB, _MIB = 1e-6, 1e9, 2**20
Row = dict[str, Any]


def nearest(worlds: Iterable[int], ranks: int) -> int:
    """Return the measured number of ranks that is nearest to a given one."""
    return min(worlds, key=lambda measured: abs(measured - ranks))


def calibrate(bare: dict[int, Figures], cores: int) -> Network:
    """Return the model of this machine, from a small and a larger world."""
    few, many = (nearest(bare, ranks) for ranks in CALIBRATED)

    def wall_s(name: str, ranks: int) -> float:
        return bare[ranks][name]["wall_s"]

    # What all ranks of a machine do at once shares its cores.
    share = {ranks: max(1.0, ranks / cores) for ranks in (few, many)}
    connects = {ranks: (ranks - 1) * share[ranks] for ranks in (few, many)}
    connect_s = max(0.0, wall_s("group", many) - wall_s("group", few)) / (connects[many] - connects[few])
    return Network(
        hop_s=wall_s("vote", few) / (2 * (few - 1)),
        crowded_hop_s=wall_s("vote", many) / (2 * (many - 1)),
        byte_s=max(1e-12, (wall_s("large exchange", many) - wall_s("small exchange", many)) / many / LARGE_BYTES),
        message_cpu_s=wall_s("small exchange", many) / share[many],
        turn_cpu_s=wall_s("gather", many) / (many - 1) / share[many],
        shared_s=SHARED_S,
        group_s=max(0.0, wall_s("group", few) - connects[few] * connect_s),
        connect_cpu_s=connect_s,
        request_s=wall_s("requests", many) / REQUESTS / many,
        ranks_per_node=many,
        cores_per_node=cores,
    )


def comparison(bare: dict[int, Figures], here: Network) -> Iterator[Row]:
    """Yield the real and the modelled time of every call in every bare world."""
    for ranks, figures in bare.items():
        one = here.one_machine(ranks)
        modelled: dict[str, Cost] = {
            "vote": one.ring_vote(ranks),
            "gather": one.gather(ranks, PAGE_BYTES),
            "small exchange": one.exchange(ranks, 1, SMALL_BYTES),
            "large exchange": one.exchange(ranks, 1, LARGE_BYTES),
            "group": one.mesh(ranks),
        }
        for name, cost in modelled.items():
            row = {"call": name, "ranks": ranks, "real_s": figures[name]["wall_s"], "model_s": cost.seconds}
            counted = {"real_bytes": figures[name]["bytes"], "model_bytes": cost.sent_bytes}
            yield row | (counted if name != "group" else {})


def projected(ranks: int, cluster: Network, state_bytes: int) -> Iterator[Row]:
    """Run every part of the protocol for a world, and yield what each takes."""
    world = world_of(ranks, cluster.ranks_per_node, state_bytes)
    phases = {
        "vote, ring of all ranks": vote(cluster, ranks, cluster.ring_vote),
        "vote, ring of one rank per node": vote(cluster, ranks, cluster.node_vote),
        "vote, doubling over one rank per node": vote(cluster, ranks, cluster.doubling_vote),
        "regroup": regroup(cluster, world, ranks - 1),
        "regroup, of it two gloo groups": Phase(cluster.mesh(ranks) + cluster.mesh(ranks), 0.0),
        "restore": restore(cluster, world, ranks - 1),
    }
    for name, phase in phases.items():
        yield {
            "part": name, "ranks": ranks, "messages": phase.cost.messages, "bytes": phase.cost.sent_bytes,
            "network_s": phase.cost.seconds, "decide_s": phase.decide_s,
        }  # fmt: skip


# ---------------------------------------------------------------------- tables


def ratio(row: Row) -> float:
    return float(row["model_s"] / row["real_s"])


def agrees(row: Row) -> bool:
    return abs(ratio(row) - 1) <= TOLERANCE


def ms(key: str) -> Callable[[Row], float]:
    return lambda row: float(1000 * row[key])


COMPARISON = (
    Column("call", "call"),
    Column("ranks", "ranks"),
    Column("real ms", ms("real_s"), ".2f"),
    Column("model ms", ms("model_s"), ".2f"),
    Column("model / real", ratio, ".2f"),
    Column("within 25 %", lambda row: "yes" if agrees(row) else "no"),
    Column("real bytes", lambda row: row.get("real_bytes"), ".0f"),
    Column("model bytes", lambda row: row.get("model_bytes"), ".0f"),
)
PROJECTION = (
    Column("part", "part"),
    Column("ranks", "ranks"),
    Column("messages", "messages", ".0f"),
    Column("MB sent", lambda row: row["bytes"] / 1e6, ".3f"),
    Column("messages ms", ms("network_s"), ".2f"),
    Column("decisions ms", ms("decide_s"), ".2f"),
    Column("total s", lambda row: row["network_s"] + row["decide_s"], ".4f"),
)


def described(network: Row) -> str:
    """Return the parameters of a model, in words."""
    names = ("hop_s", "crowded_hop_s", "message_cpu_s", "turn_cpu_s", "group_s", "connect_cpu_s", "request_s")
    hop, crowded, message, turn, group, connection, request = (f"{network[name] / _US:.0f} us" for name in names)
    return (
        f"alpha {hop} (crowded {crowded}), beta {1 / network['byte_s'] / _GB:.1f} GB/s; CPU time of a message "
        f"{message}, of a step of a gather {turn}, of a connection {connection}, of a request to the store {request}; "
        f"fixed time of a group {group}; {network['ranks_per_node']} ranks and {network['cores_per_node']} cores per "
        "node"
    )


@dataclass
class Projection(Benchmark):
    ranks: tuple[int, ...] = option((64, 128, 256, 512, 1024, 2048, 4096, 8192), "ranks to project", quick=(64, 512))
    alpha_us: float = option(0.0, "latency of a hop in microseconds; 0 for that of loopback, measured")
    beta_gb_per_s: float = option(22.0, "bandwidth of a node in GB/s")
    ranks_per_node: int = option(8, "ranks of a node")
    state_mib: int = option(1024, "size of the replicated state", quick=64)

    def measure(self, results: Results, steps: Steps) -> None:
        compared = QUICK_COMPARED if self.quick else COMPARED
        steps.expect(len(compared) + len(self.ranks))
        bare: dict[int, Figures] = {}
        for ranks in compared:
            steps.begin(f"{ranks} processes")
            bare[ranks] = measure_bare_world(ranks)
            steps.done()
        here = calibrate(bare, CORES)
        cluster = replace(
            here, hop_s=self.alpha_us * _US or here.hop_s, byte_s=1 / (self.beta_gb_per_s * _GB),
            ranks_per_node=self.ranks_per_node, cores_per_node=CORES_PER_NODE,
        )  # fmt: skip
        results |= {"bare": bare, "here": asdict(here), "cluster": asdict(cluster), "projected": []}
        results["compared"] = [*comparison(bare, here)]
        for ranks in self.ranks:
            steps.begin(f"{ranks} ranks")
            results["projected"] += projected(ranks, cluster, self.state_mib * _MIB)
            steps.done()

    def tables(self, results: Results) -> list[Table]:
        rows = sorted(results["compared"], key=lambda row: (row["call"], row["ranks"]))
        good, word = sum(map(agrees, rows)), "met" if all(map(agrees, rows)) else "missed"
        order = sorted(results["projected"], key=lambda row: (row["part"], row["ranks"]))
        notes = [
            f"{good} of {len(rows)} figures agree within 25 % (target: all): {word}",
            f"Calibrated on {CALIBRATED[0]} and {CALIBRATED[1]} ranks: {described(results['here'])}.",
        ]
        return [
            Table.of("The model and this machine", rows, *COMPARISON, notes=notes),
            Table.of("One rank of a large world", order, *PROJECTION, notes=[described(results["cluster"]) + "."]),
        ]


if __name__ == "__main__":
    Projection.main()
