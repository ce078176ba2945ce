"""One of four nodes is killed, the others continue without it, and it rejoins: times, and the samples that were used.

Four agents of one CPU rank each run on loopback with `--nnodes 3:4`. Repeatedly, the agent of a node and its worker are
killed and its shared memory is removed; another agent is started in its place once the others continue. For comparison,
torchrun runs Lightning's ddp with a checkpoint file from which every start resumes. At the end, all samples that the
ranks used are counted, and the weights are compared with those of an undisturbed run. The first node, with rank 0, is
never killed. Takes a quarter of an hour.
"""

from __future__ import annotations

import random
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.nodes import MAX_NODES, SILENCE_S, Nodes, NodesLostError, Setup
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_choice, add_count, console
from benchmarks.harness.samples import Step, finished, first_of, tally
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of, p95
from benchmarks.harness.watch import START_S, NoRecoveryError
from benchmarks.jobs.counted import WEIGHTS
from benchmarks.jobs.job import JobOptions
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger

EVERY = 50
"""Steps between two checkpoint files in torchrun's row."""
BATCH = 3
TIMEOUT_S = 120.0
SPARE_STEPS = 10
"""Steps that the job makes after a change before the next event."""
RANDOM_STEPS = 50

FILES = JobOptions(strategy="ddp", checkpoint_every=EVERY)
SETUPS = (
    Setup("DDP, in place", OURS),
    Setup("DDP, --no-in-place", OURS, ("--no-in-place",)),
    Setup("FSDP2, in place", OURS.but(sharded=True)),
    Setup('DDP, in place, elastic_batch="scale"', OURS.but(strategy_options={"elastic_batch": "scale"})),
    Setup(f"torchrun, ddp + ModelCheckpoint({EVERY})", FILES),
)
MARKS = {"noticed_s": "node_lost", "met_s": "move", "told_s": "fault", "restored_s": "restored"}
"""Moments of a loss, and the events that the ledger recorded first at each."""
LOSS_PHASES = ("notice", "meet", "tell the workers", "regroup and restore", "first step")
Found = dict[str, Any]


# ---------------------------------------------------------------------- measurement


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure every setup, and store the results as they arrive."""
    setups = [setup for setup in SETUPS if not args.only or setup.name in args.only]
    chance = random.Random(args.seed)
    size = {"batch": BATCH, "samples": args.steps * MAX_NODES * BATCH, "epochs": args.repeats + 2, "counted": True}
    results["setups"] = {}
    steps.expect(2 * len(setups))
    with scratch() as place:
        weights: dict[bool, Path | None] = {}
        for number, setup in enumerate(setups):
            if setup.job.sharded not in weights:
                steps.begin(f"undisturbed, {'FSDP2' if setup.job.sharded else 'DDP'}")
                weights[setup.job.sharded] = undisturbed(setup.job.sharded, size, place)
            steps.done()
            steps.begin(setup.name)
            sized = Setup(setup.name, setup.job.but(**size), setup.flags)
            with Nodes(sized, place, f"job-{number}") as nodes:
                results["setups"][setup.name] = train(nodes, args.repeats, chance, weights[setup.job.sharded])
            steps.done()


def undisturbed(sharded: bool, size: dict[str, Any], place: Scratch) -> Path | None:
    """Train undisturbed with four ranks on one node; returns the file of weights, None if that failed."""
    scenario = Scenario("undisturbed", ckptless_run(), OURS.but(devices=MAX_NODES, sharded=sharded))
    with running(scenario, place, f"undisturbed-{sharded}", **size) as (watch, folder):
        try:
            watch.until_end()
        except NoRecoveryError as error:
            console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
            return None
    return folder / WEIGHTS


def train(nodes: Nodes, repeats: int, chance: random.Random, weights: Path | None) -> Found:
    """Run one job with losses and returns, then count samples and compare weights."""
    found: Found = {"cycles": [], "failed": ""}
    setup = nodes.setup
    try:
        for number in range(MAX_NODES):
            nodes.start(number)
        after = 0.0
        for number in range(repeats):
            found["cycles"].append(cycle(nodes, 1 + number % (MAX_NODES - 1), chance, after))
            after = found["cycles"][-1]["full_at"]
        nodes.wait()
        counted = tally(nodes.rows, samples=setup.job.samples, epochs=setup.job.epochs)
        found |= {"due": counted.due, "twice": counted.twice, "never": counted.never}
        if weights is not None:
            found["weight"] = furthest(nodes.folder / WEIGHTS, weights)
    except (NodesLostError, subprocess.TimeoutExpired) as error:
        console.print(f"{setup.name}: {error}", markup=False)
        found["failed"] = str(error)
    if setup.is_ours:
        [ledger] = nodes.folder.glob(f"runs/*/{LEDGER_NAME}")
        add_marks(found["cycles"], read_ledger(ledger).events)
    return found


def cycle(nodes: Nodes, victim: int, chance: random.Random, after: float) -> Found:
    """Kill a node, wait until the others continue, start it again, and wait until all continue.

    Args:
        nodes: nodes of a job that trains.
        victim: node to kill.
        chance: random generator for the moment.
        after: wall clock from which steps of all nodes count.

    Raises:
        NodesLostError: If the others, or later all nodes, do not continue.
    """
    few, all_nodes = MAX_NODES - 1, MAX_NODES

    def until_made(world: int, steps: int, since: float, timeout_s: float = START_S) -> None:
        def made(_: object) -> bool | None:
            return sum(step.world == world and step.at > since for step in finished(nodes.rows)) >= steps or None

        nodes.until(made, timeout_s, f"{steps} steps of {world} ranks")

    def first_step(world: int, since: float) -> Step:
        awaited = f"a step of {world} ranks"
        return nodes.until(lambda rows: first_of(finished(rows), world, after=since), TIMEOUT_S, awaited)

    until_made(all_nodes, SPARE_STEPS + chance.randrange(RANDOM_STEPS), after)
    until_made(all_nodes, SPARE_STEPS, nodes.slow_down())
    killed_at = nodes.kill(victim)
    small = first_step(few, killed_at)
    until_made(few, SPARE_STEPS, killed_at, TIMEOUT_S)
    came_at = nodes.start(victim)
    full = first_step(all_nodes, came_at)
    nodes.speed_up()
    steps = finished(nodes.rows)
    moments = {"victim": victim, "killed_at": killed_at, "came_at": came_at, "full_at": full.at}
    return {**moments, "shrink": shrunk(steps, killed_at, small), "grow": grown(steps, came_at, full)}


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
        for mark, name in MARKS.items():
            moments = [event.at - killed_at for event in events if event.event == name]
            within = [at for at in moments if 0 < at < came_at - killed_at]
            found["shrink"] |= {mark: min(within)} if within else {}


def phases_of(lost: Found) -> Found:
    """Return the time of each phase of a loss in seconds, from the moments that the ledger recorded."""
    moments = [0.0, *(lost.get(mark) for mark in MARKS), lost["seconds"]]
    if None in moments:
        return {}
    return dict(zip(LOSS_PHASES, (end - begin for begin, end in pairwise(moments)), strict=True))


def furthest(left: Path, right: Path) -> float:
    """Return the largest difference of a weight."""
    a, b = torch.load(left), torch.load(right)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---------------------------------------------------------------------- tables


def beyond_s(group: Group) -> list[float]:
    """Return the seconds from the detection of each loss to the first step of the others."""
    return [one["seconds"] - one["noticed_s"] for one in group.items if "noticed_s" in one]


def fact(key: str) -> Callable[[Group], object]:
    return lambda group: group.context.get(key)


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
SAMPLES = (
    HOW,
    Column("kills", count_of),
    Column("samples due", fact("due")),
    Column("repeated", fact("twice")),
    Column("skipped", fact("never")),
    Column("largest difference of a weight", fact("weight"), ".1e"),
)
SAMPLES_NOTE = (
    "Counted from what each rank has recorded, without the steps that were rolled back. Repeated: a sample that an "
    "epoch uses a second time. Skipped: a sample that an epoch does not use."
)


def shrink_notes(setups: Mapping[str, Found]) -> list[str]:
    interval_s, attempts = SILENCE_S
    ours = (
        "A node whose agent's connection was closed is lost after at least 1 s without a heartbeat, any other after "
        "the usual limit plus one interval. Detected: the ledger's `node_lost`."
    )
    theirs = (
        "torchrun's agents do not report when they detect the loss: their workers fail immediately, and the rendezvous "
        f"waits {interval_s * attempts} s before it removes the lost node."
    )
    failed = [f"{name}: {found['failed'].splitlines()[0]}" for name, found in setups.items() if found["failed"]]
    return [ours, theirs, *failed]


def loss_table(group: Group) -> Table:
    """Return the table of the phases of a setup's losses."""
    losses = [phases for lost in group.items if (phases := phases_of(lost))]
    rows = [Group(phase, [phases[phase] for phases in losses]) for phase in LOSS_PHASES]
    return Table.of(f"Phases of a loss: {group.name}", rows, *LOSS, notes=[LOSS_NOTE])


def tables(_: Namespace, results: Results) -> list[Table]:
    setups: dict[str, Found] = results["setups"]
    losses, returns = (
        [Group(setup, [cycle[kind] for cycle in found["cycles"]], found) for setup, found in setups.items()]
        for kind in ("shrink", "grow")
    )
    counted = [group for group in losses if "due" in group.context]
    kill = "A node of four is killed, to the first step finished by all of the other three"
    samples = "Samples used in all epochs, and the result compared with an undisturbed run"
    returned = [group for group in returns if group.items]
    paused = "Paused: from the last step of three ranks to the first of four, slowest rank."
    return [
        Table.of(kill, losses, *SHRINK, notes=shrink_notes(setups)),
        *(loss_table(group) for group in losses if any(map(phases_of, group.items))),
        Table.of("The node rejoins", returned, *GROW, notes=[paused]),
        Table.of(samples, counted, *SAMPLES, notes=[SAMPLES_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    add_count(parser, "--repeats", Default(3, 1), "kills of each setup")
    add_count(parser, "--steps", 300, "steps per epoch")
    add_count(parser, "--seed", 1, "seed of the moments")
    add_choice(parser, "--only", [setup.name for setup in SETUPS], "setups")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
