"""Agents that exchange heartbeats while all cores are busy: is one considered lost although it lives?

Each run has rounds of ten seconds. In every round, all connections between the agents are closed once while the agents
live on, as by a firewall. That is the time at which the least silence is required.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.processes import busy_loops
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of
from benchmarks.harness.world import answers_of
from lightning_ckptless.membership.agent.node_liveness import Heartbeat
from lightning_ckptless.membership.worker.connections import abort_connections_to
from lightning_ckptless.protocol.node_liveness import AllAlive, Bound, watched_by

NODES = 3
HOST = "127.0.0.1"
ROUND_S = 10.0
CLOSE_AFTER_S = 6.0
"""Time for a node to know its longest pause between heartbeats."""
LOOK_S, START_S = 0.02, 120.0
BOUND = Bound(2.0, 3)
"""The defaults of `ckptless run`."""
Round = dict[str, Any]


def agent(node: int, port: int, rounds: int) -> list[Round]:
    """Exchange heartbeats as one of the agents, and return what was found in each round."""
    store, found = TCPStore(HOST, port, is_master=False), []
    heartbeat = Heartbeat(BOUND, HOST)
    for number in range(rounds):
        of_round = PrefixStore(f"round-{number}", store)
        heartbeat.begin_round(of_round, node=node, nodes=NODES, place=(HOST, port), worker_store=(HOST, 1))
        found.append(watch(heartbeat, of_round, node))
        # No agent ends its round before all have seen the end of theirs.
        of_round.set(f"done/{node}", "1")
        of_round.wait([f"done/{other}" for other in range(NODES)])
    heartbeat.leave()
    heartbeat.close()
    return found


def watch(heartbeat: Heartbeat, store: Any, node: int) -> Round:
    """Close this agent's connections to others in the middle of a round; returns what it has found by the end."""
    began, closed, last, longest_s = time.monotonic(), 0, time.monotonic(), 0.0
    reasons: list[str] = []
    while (now := time.monotonic()) - began < ROUND_S:
        longest_s, last = max(longest_s, now - last), now
        if not closed and now - began > CLOSE_AFTER_S:
            keys = [f"ckptless/heartbeat/{other}/address" for other in watched_by(node, NODES)]
            closed = abort_connections_to([(HOST, int(store.get(key).decode().split()[1])) for key in keys])
        if not isinstance(found := heartbeat.finding, AllAlive) and not reasons:
            reasons.append(found.reason)
        time.sleep(LOOK_S)
    return {"node": node, "closed": closed, "reasons": reasons, "late_s": longest_s - LOOK_S}


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Make `args.repeats` runs beside busy loops."""
    rounds = max(1, round(args.seconds / ROUND_S))
    results["rounds"], results["loops"] = [], args.loops * (os.cpu_count() or 1)
    steps.expect(args.repeats)
    for _ in range(args.repeats):
        steps.begin(f"{rounds} rounds beside {results['loops']} busy loops")
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        with busy_loops(results["loops"]):
            found = answers_of(NODES, agent, store.port, rounds, timeout_s=START_S + 2 * rounds * ROUND_S)
        results["rounds"] += chain.from_iterable(found)
        steps.done()


def total(key: str) -> Callable[[Group], int]:
    return lambda group: sum(item[key] if isinstance(item[key], int) else len(item[key]) for item in group.items)


COLUMNS = (
    Column("beside", name_of),
    Column("agents x rounds", count_of),
    Column("connections closed", total("closed")),
    Column("losses found, all of them false", total("reasons")),
    Column("latest an agent ran s", each("late_s"), ".2f", max),
)


def tables(args: Namespace, results: Results) -> list[Table]:
    group = Group(f"{results['loops']} busy loops", results["rounds"])
    reasons = [reason for item in group.items for reason in item["reasons"]]
    title = f"{args.repeats} runs of {args.seconds} s: {NODES} agents on one machine"
    return [Table.of(title, [group], *COLUMNS, notes=reasons)]


def options(parser: ArgumentParser) -> None:
    add_count(parser, "--repeats", Default(10, 1), "runs")
    add_count(parser, "--seconds", Default(120, 10), "length of a run")
    add_count(parser, "--loops", 2, "busy loops per core")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
