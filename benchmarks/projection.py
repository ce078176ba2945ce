"""What a vote, a regroup and a restore take with 64 to 8,192 ranks: the real decisions, and a model of the network.

First, small worlds of processes on this machine calibrate the model, and larger ones are compared with it. Then one
rank of each large world runs the protocol's own code, and the model prices its messages by the algorithms of gloo. The
nodes and the network of the large worlds are options; their defaults are the latency and the CPU times of this machine.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table
from benchmarks.model.bare_world import LARGE_BYTES, REQUESTS, SMALL_BYTES, Figures, measure_bare_world
from benchmarks.model.modelled_rank import PAGE_BYTES, Phase, regroup, restore, vote, world_of
from benchmarks.model.network import Cost, Network

CALIBRATED = (8, 32)
"""Numbers of ranks that the model is fitted to; the others are predicted."""
COMPARED = (2, 4, 8, 16, 32, 64)
QUICK_COMPARED = (2, 4, 16)
PROJECTED = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOLERANCE = 0.25
SHARED_S = 2e-6
"""Not calibrated: a flag in shared memory is seen by another core within a microsecond or two."""
_US, _GB, _MIB = 1e-6, 1e9, 2**20
Rows = list[dict[str, Any]]


# ---------------------------------------------------------------------- calibration


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


def comparison(bare: dict[int, Figures], here: Network) -> Iterator[dict[str, Any]]:
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
            real = figures[name]
            row = {"call": name, "ranks": ranks, "real_s": real["wall_s"], "model_s": cost.seconds}
            yield row | {"real_bytes": real["bytes"] if name != "group" else None, "model_bytes": cost.sent_bytes}


class Own(NamedTuple):
    """The part of a phase that is no message and no decision of the protocol: a fixed time, and CPU time of a rank."""

    fixed_s: float
    cpu_s: float

    def seconds(self, ranks: int, network: Network) -> float:
        return self.fixed_s + network.on_cores(ranks, self.cpu_s)


PHASES: dict[str, Callable[..., Phase]] = {"regroup": regroup, "restore": restore}


def real_phases(path: Path) -> dict[str, dict[int, float]]:
    """Return the medians of the phases that `benchmarks.scale` has measured, by number of ranks."""
    worlds = json.loads(path.read_text())["results"]["worlds"]
    found: dict[str, dict[int, float]] = {name: {} for name in PHASES}
    for row in worlds:
        accounts = [kill["ledger"]["phases"] for kill in row["kills"] if "ledger" in kill]
        for name in PHASES if accounts else ():
            found[name][row["ranks"]] = median(phases[f"{name}_s"] for phases in accounts)
    return found


def modelled_phase(name: str, network: Network, ranks: int, state_bytes: int) -> Phase:
    """Run a phase on the last rank of a world of at least two ranks."""
    return PHASES[name](network, world_of(ranks, network.ranks_per_node, state_bytes), ranks - 1)


def own_part(name: str, real: dict[int, float], here: Network, state_bytes: int) -> Own:
    """Fit what the model does not contain to two small worlds."""
    few, many = (nearest(real, ranks) for ranks in CALIBRATED)
    left = {
        n: max(0.0, real[n] - modelled_phase(name, here.one_machine(n), n, state_bytes).seconds) for n in (few, many)
    }
    shares = {n: here.one_machine(n).slowdown(n) for n in left}
    if few == many or shares[few] == shares[many]:
        return Own(left[few], 0.0)
    cpu_s = max(0.0, (left[many] - left[few]) / (shares[many] - shares[few]))
    return Own(max(0.0, left[few] - cpu_s * shares[few]), cpu_s)


def phase_comparison(real: dict[str, dict[int, float]], here: Network, state_bytes: int) -> tuple[Rows, dict[str, Own]]:
    """Compare the phases of real recoveries with the model, and return the part that was fitted."""
    rows: Rows = []
    owns: dict[str, Own] = {}
    for name, measured in real.items():
        if not measured:
            continue
        own = owns[name] = own_part(name, measured, here, state_bytes)
        for ranks, seconds in measured.items():
            one = here.one_machine(ranks)
            model_s = modelled_phase(name, one, ranks, state_bytes).seconds + own.seconds(ranks, one)
            rows.append({"call": name, "ranks": ranks, "real_s": seconds, "model_s": model_s})
    return rows, owns


# ---------------------------------------------------------------------- projection


def cluster_of(args: Namespace, here: Network) -> Network:
    """Return the model of the cluster that the options describe."""
    return replace(
        here,
        hop_s=here.hop_s if args.alpha_us is None else args.alpha_us * _US,
        byte_s=here.byte_s if args.beta_gb_per_s is None else 1 / (args.beta_gb_per_s * _GB),
        ranks_per_node=args.ranks_per_node,
        cores_per_node=args.cores_per_node,
    )


def projected(ranks: int, cluster: Network, owns: dict[str, Own], state_bytes: int) -> Rows:
    """Run every part of the protocol for a world, and return what each takes."""
    forms = {
        "vote, ring of all ranks": cluster.ring_vote,
        "vote, ring of one rank per node": cluster.node_vote,
        "vote, doubling over one rank per node": cluster.doubling_vote,
    }
    phases = {name: vote(cluster, ranks, form) for name, form in forms.items()}
    world = world_of(ranks, cluster.ranks_per_node, state_bytes)
    phases |= {name: run(cluster, world, ranks - 1) for name, run in PHASES.items()}
    phases["regroup, of it two gloo groups"] = Phase(cluster.mesh(ranks) + cluster.mesh(ranks), 0.0)
    return [
        {
            "part": name, "ranks": ranks, "messages": phase.cost.messages, "bytes": phase.cost.sent_bytes,
            "gathers": phase.gathers, "network_s": phase.cost.seconds, "decide_s": phase.decide_s,
            "own_s": owns[name].seconds(ranks, cluster) if name in owns else 0.0,
        }
        for name, phase in phases.items()
    ]  # fmt: skip


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Calibrate, compare, and project."""
    compared = QUICK_COMPARED if args.quick else COMPARED
    steps.expect(len(compared) + len(args.ranks))
    bare: dict[int, Figures] = {}
    for ranks in compared:
        steps.begin(f"{ranks} processes")
        bare[ranks] = measure_bare_world(ranks)
        steps.done()
    here = calibrate(bare, args.cores)
    results |= {"bare": bare, "here": asdict(here), "compared": [*comparison(bare, here)], "projected": []}
    owns: dict[str, Own] = {}
    if args.scale is not None:
        rows, owns = phase_comparison(real_phases(args.scale), here, args.real_state_kib * 1024)
        results["compared"] += rows
    cluster = cluster_of(args, here)
    results |= {"cluster": asdict(cluster), "owns": {name: own._asdict() for name, own in owns.items()}}
    for ranks in args.ranks:
        steps.begin(f"{ranks} ranks")
        results["projected"] += projected(ranks, cluster, owns, args.state_mib * _MIB)
        steps.done()


# ---------------------------------------------------------------------- tables


def ratio(row: dict[str, Any]) -> float:
    return float(row["model_s"] / row["real_s"])


def agrees(row: dict[str, Any]) -> bool:
    return abs(ratio(row) - 1) <= TOLERANCE


def total_s(row: dict[str, Any]) -> float:
    return float(row["network_s"] + row["decide_s"] + row["own_s"])


def ms(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: None if row.get(key) is None else 1000 * row[key]


COMPARISON = (
    Column("call", "call"),
    Column("ranks", "ranks"),
    Column("real ms", ms("real_s"), ".2f"),
    Column("model ms", ms("model_s"), ".2f"),
    Column("model / real", ratio, ".2f"),
    Column("within 25 %", lambda row: "yes" if agrees(row) else "no"),
    Column("real bytes", lambda row: row.get("real_bytes"), ".0f"),
    Column("model bytes", lambda row: row["model_bytes"] if row.get("real_bytes") else None, ".0f"),
)
PROJECTION = (
    Column("part", "part"),
    Column("ranks", "ranks"),
    Column("messages", "messages", ".0f"),
    Column("MB sent", lambda row: row["bytes"] / 1e6, ".3f"),
    Column("gathers", "gathers"),
    Column("messages ms", ms("network_s"), ".2f"),
    Column("decisions ms", ms("decide_s"), ".2f"),
    Column("other ms", ms("own_s"), ".0f"),
    Column("total s", total_s, ".4f"),
)


def described(network: dict[str, Any]) -> str:
    """Return the parameters of a model, in words."""
    names = ("hop_s", "crowded_hop_s", "message_cpu_s", "turn_cpu_s", "group_s", "connect_cpu_s", "request_s")
    hop, crowded, message, turn, group, connection, request = (f"{network[name] / _US:.0f} us" for name in names)
    return (
        f"alpha {hop} (crowded {crowded}), beta {1 / network['byte_s'] / _GB:.1f} GB/s; CPU time of a message "
        f"{message}, of a step of a gather {turn}, of a connection {connection}, of a request to the store {request}; "
        f"fixed time of a group {group}; {network['ranks_per_node']} ranks and {network['cores_per_node']} cores per "
        "node"
    )


def tables(_: Namespace, results: Results) -> list[Table]:
    rows = sorted(results["compared"], key=lambda row: (row["call"], row["ranks"]))
    good = sum(map(agrees, rows))
    notes = [
        f"{good} of {len(rows)} figures agree within 25 % (target: all): {'met' if good == len(rows) else 'missed'}"
    ]
    notes.append(f"Calibrated on {CALIBRATED[0]} and {CALIBRATED[1]} ranks: {described(results['here'])}.")
    order = sorted(results["projected"], key=lambda row: (row["part"].partition(",")[0], row["part"], row["ranks"]))
    return [
        Table.of("The model and this machine", rows, *COMPARISON, notes=notes),
        Table.of("One rank of a large world", order, *PROJECTION, notes=[described(results["cluster"]) + "."]),
    ]


def options(parser: ArgumentParser) -> None:
    about = "numbers of ranks to project (default: %(default)s)"
    parser.add_argument("--ranks", type=int, nargs="+", default=[*PROJECTED], help=about)
    parser.add_argument(
        "--scale", type=Path, metavar="FILE", help="JSON of benchmarks.scale, to compare its recoveries"
    )
    about = "latency of a hop in microseconds (default: that of loopback, measured)"
    parser.add_argument("--alpha-us", type=float, help=about)
    about = "bandwidth of a node in GB/s (default: that of loopback, measured)"
    parser.add_argument("--beta-gb-per-s", type=float, help=about)
    add_count(parser, "--ranks-per-node", 8, "ranks of a node")
    add_count(parser, "--cores-per-node", 64, "cores of a node")
    add_count(parser, "--cores", 2, "cores of this machine")
    add_count(parser, "--state-mib", Default(1024, 64), "size of the replicated state")
    add_count(parser, "--real-state-kib", 264, "size of the state in the file of --scale")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
