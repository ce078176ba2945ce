"""One of four nodes is killed, the others continue without it, and it rejoins: how long training pauses.

Four agents of one CPU rank each run on loopback with `--nnodes 3:4`. Repeatedly, the agent of a node and its worker are
killed and its shared memory is removed; another agent is started in its place once the others continue. The first node,
with rank 0, is never killed. Takes ten minutes.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.harness.nodes import MAX_NODES, Nodes, NodesLostError, Step, first_of
from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_choice, add_count, console
from benchmarks.harness.scenario import OURS
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of, p95
from benchmarks.harness.watch import START_S
from benchmarks.jobs.job import JobOptions
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger

TIMEOUT_S = 120.0
SPARE_STEPS = 10
"""Steps that the job makes after a change before the next event."""
RANDOM_STEPS = 50

SETUPS: dict[str, tuple[JobOptions, tuple[str, ...]]] = {
    "DDP, in place": (OURS, ()),
    "DDP, --no-in-place": (OURS, ("--no-in-place",)),
    "FSDP2, in place": (OURS.but(sharded=True), ()),
}
"""What is trained, and flags of `ckptless run`."""
MARKS = {"noticed_s": "node_lost", "met_s": "move", "told_s": "fault", "restored_s": "restored"}
"""Moments of a loss, and the events that the ledger recorded first at each."""
LOSS_PHASES = ("notice", "meet", "tell the workers", "regroup and restore", "first step")
Found = dict[str, Any]


# ---------------------------------------------------------------------- measurement


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure every setup, and store the results as they arrive."""
    chance = random.Random(args.seed)
    names = [name for name in SETUPS if not args.only or name in args.only]
    results["setups"] = {}
    steps.expect(args.repeats * len(names))
    with scratch() as place:
        for number, name in enumerate(names):
            steps.begin(name)
            with Nodes(*SETUPS[name], place, f"job-{number}") as nodes:
                found: Found = {"cycles": [], "failed": ""}
                results["setups"][name] = found
                try:
                    for node in range(MAX_NODES):
                        nodes.start(node)
                    for repeat in range(args.repeats):
                        found["cycles"].append(cycle(nodes, 1 + repeat % (MAX_NODES - 1), chance))
                        steps.done()
                except NodesLostError as error:
                    console.print(f"{name}: {error}", markup=False)
                    found["failed"] = str(error)
                [ledger] = nodes.folder.glob(f"runs/*/{LEDGER_NAME}")
                add_marks(found["cycles"], read_ledger(ledger).events)


def cycle(nodes: Nodes, victim: int, chance: random.Random) -> Found:
    """Kill a node, wait until the others continue, start it again, and wait until all continue.

    Raises:
        NodesLostError: If the others, or later all nodes, do not continue.
    """
    few, all_nodes = MAX_NODES - 1, MAX_NODES

    def until_made(world: int, count: int, timeout_s: float = START_S) -> None:
        """Wait until the last `count` steps were made by a world of this size."""

        def made(steps: list[Step]) -> bool | None:
            return (len(steps) >= count and all(step.world == world for step in steps[-count:])) or None

        nodes.until(made, timeout_s, f"{count} steps of {world} ranks")

    def first_step(world: int, since: float) -> Step:
        return nodes.until(lambda steps: first_of(steps, world, after=since), TIMEOUT_S, f"a step of {world} ranks")

    until_made(all_nodes, SPARE_STEPS + chance.randrange(RANDOM_STEPS))
    killed_at = nodes.kill(victim)
    small = first_step(few, killed_at)
    until_made(few, SPARE_STEPS, TIMEOUT_S)
    came_at = nodes.start(victim)
    full = first_step(all_nodes, came_at)
    moments = {"victim": victim, "killed_at": killed_at, "came_at": came_at, "full_at": full.at}
    return {**moments, "shrink": shrunk(nodes.steps, killed_at, small), "grow": grown(nodes.steps, came_at, full)}


def shrunk(steps: list[Step], killed_at: float, small: Step) -> Found:
    """Return the cost of losing a node, given all finished steps and the first one of the remaining nodes."""
    before = [step for step in steps if step.at < killed_at][-SPARE_STEPS:]
    return {
        "seconds": small.at - killed_at,
        "step_s": median(after.at - at.at for at, after in pairwise(before)),
        "repeated_steps": before[-1].number + 1 - small.number,
    }


def grown(steps: list[Step], came_at: float, full: Step) -> Found:
    """Return the cost of a node's return to the others, given all finished steps and the first one of all nodes."""
    last = [step for step in steps if step.at < full.at][-1]
    return {
        "paused_s": full.at - last.at,
        "seconds": full.at - came_at,
        "steps_meanwhile": sum(came_at < step.at <= last.at for step in steps),
        "repeated_steps": last.number + 1 - full.number,
    }


def add_marks(cycles: list[Found], events: Sequence[Event]) -> None:
    """Add to every loss the first of each event in `MARKS` that the ledger recorded before the node rejoined."""
    for found in cycles:
        killed_at, came_at = found["killed_at"], found["came_at"]
        meanwhile = [event for event in events if killed_at < event.at < came_at]
        for mark, name in MARKS.items():
            within = [event.at - killed_at for event in meanwhile if event.event == name]
            found["shrink"] |= {mark: min(within)} if within else {}


def phases_of(lost: Found) -> Found:
    """Return the time of each phase of a loss in seconds, from the moments that the ledger recorded."""
    moments = [0.0, *(lost.get(mark) for mark in MARKS), lost["seconds"]]
    if None in moments:
        return {}
    return dict(zip(LOSS_PHASES, (end - begin for begin, end in pairwise(moments)), strict=True))


# ---------------------------------------------------------------------- tables


def beyond_s(group: Group) -> list[float]:
    """Return the seconds from the detection of each loss to the first step of the others."""
    return [one["seconds"] - one["noticed_s"] for one in group.items if "noticed_s" in one]


HOW = Column("how", name_of)
REPLAYED = (
    Column("steps replayed p50", each("repeated_steps"), "g", median),
    Column("max", each("repeated_steps"), "g", max),
)
SHRINK = (
    HOW,
    Column("kills", count_of),
    Column("p50 s", each("seconds"), ".2f", median),
    Column("p95 s", each("seconds"), ".2f", p95),
    Column("max s", each("seconds"), ".2f", max),
    Column("detected after p50 s", each("noticed_s"), ".2f", median),
    Column("from there p50 s", beyond_s, ".2f", median),
    Column("max s", beyond_s, ".2f", max),
    Column("one step s", each("step_s"), ".2f", median),
    *REPLAYED,
)
SHRINK_NOTE = (
    "A node whose agent's connection was closed is lost after at least 1 s without a heartbeat, any other after the "
    "limit (the defaults) plus one interval. Detected: the ledger's `node_lost`."
)
LOSS = (
    Column("phase", name_of),
    Column("kills", count_of),
    Column("p50 s", lambda group: group.items, ".2f", median),
    Column("p95 s", lambda group: group.items, ".2f", p95),
    Column("max s", lambda group: group.items, ".2f", max),
)
LOSS_NOTE = (
    "notice: from the kill until another agent considers the node lost. meet: until the agents have re-rendezvoused. "
    "tell the workers: until they receive their new ranks. first step: replay included."
)
GROW = (
    HOW,
    Column("returns", count_of),
    Column("others paused p50 s", each("paused_s"), ".2f", median),
    Column("max s", each("paused_s"), ".2f", max),
    Column("agent start to a step of all p50 s", each("seconds"), ".2f", median),
    Column("max s", each("seconds"), ".2f", max),
    Column("steps of the others in the meantime p50", each("steps_meanwhile"), "g", median),
    Column("max", each("steps_meanwhile"), "g", max),
    *REPLAYED,
)


def loss_table(group: Group) -> Table:
    """Return the table of the phases of a setup's losses."""
    losses = [phases for lost in group.items if (phases := phases_of(lost))]
    rows = [Group(phase, [phases[phase] for phases in losses]) for phase in LOSS_PHASES]
    return Table.of(f"Phases of a loss: {group.name}", rows, *LOSS, notes=[LOSS_NOTE])


def tables(_: Namespace, results: Results) -> list[Table]:
    setups: dict[str, Found] = results["setups"]
    losses, returns = (
        [Group(setup, [cycle[kind] for cycle in found["cycles"]]) for setup, found in setups.items()]
        for kind in ("shrink", "grow")
    )
    failed = [f"{name}: {found['failed'].splitlines()[0]}" for name, found in setups.items() if found["failed"]]
    kill = "A node of four is killed, to the first step finished by all of the other three"
    paused = "Paused: from the last step of three ranks to the first of four, slowest rank."
    return [
        Table.of(kill, losses, *SHRINK, notes=[SHRINK_NOTE, *failed]),
        *(loss_table(group) for group in losses if any(map(phases_of, group.items))),
        Table.of("The node rejoins", [group for group in returns if group.items], *GROW, notes=[paused]),
    ]


def options(parser: ArgumentParser) -> None:
    add_count(parser, "--repeats", Default(3, 1), "kills of each setup")
    add_count(parser, "--seed", 1, "seed of the moments")
    add_choice(parser, "--only", list(SETUPS), "setups")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
