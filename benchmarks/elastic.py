"""One of four nodes is killed, the others continue without it, and it rejoins: times, and the samples that were used.

Four agents of one CPU rank each run on loopback with `--nnodes 3:4`. Repeatedly, the agent of a node and its worker are
killed and its shared memory is removed; another agent is started in its place once the others continue. For comparison,
torchrun runs Lightning's ddp with a checkpoint file from which every start resumes. At the end, all samples that the
ranks used are counted, and the weights are compared with those of an undisturbed run. The first node, with rank 0, is
never killed. Takes a quarter of an hour.
"""

from __future__ import annotations

import json
import random
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.nodes import MAX_NODES, Bound, Nodes, NodesLostError, Setup, run_undisturbed
from benchmarks.harness.processes import Scratch, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_choice, add_count, console
from benchmarks.harness.samples import Rows, Step, finished, first_of, tally
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of, p95
from benchmarks.recovery import PHASES, phase
from lightning_ckptless.ledger import Event

EVERY = 50
"""Steps between two checkpoint files in torchrun's row."""
START_S = 180.0
TIMEOUT_S = 120.0
THEIRS = Bound()
"""How long a node of torchrun's row may be silent."""
SPARE_STEPS = 10
"""Steps that the job makes after a change before the next event."""
RANDOM_STEPS = 50

SETUPS = (
    Setup("DDP, in place"),
    Setup("DDP, --no-in-place", flags=("--no-in-place",)),
    Setup("FSDP2, in place", sharded=True),
    Setup('DDP, in place, elastic_batch="scale"', ("--strategy-options={'elastic_batch': 'scale'}",)),
    Setup(f"torchrun, ddp + ModelCheckpoint({EVERY})", checkpoint_every=EVERY),
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
    results["setups"] = {}
    steps.expect(len(setups) + 2)
    with scratch() as place:
        undisturbed: dict[bool, Path | None] = {}
        for sharded in (False, True):
            steps.begin(f"undisturbed, {'FSDP2' if sharded else 'DDP'}")
            if any(setup.sharded == sharded for setup in setups):
                undisturbed[sharded] = train_undisturbed(Setup("", sharded=sharded), place, size_of(args))
            steps.done()
        for setup in setups:
            steps.begin(setup.name)
            results["setups"][setup.name] = train(setup, args, place, chance, undisturbed[setup.sharded])
            steps.done()


def counts_of(args: Namespace) -> dict[str, int]:
    """Return the size of the dataset, and the number of epochs."""
    return {"samples": args.steps * MAX_NODES * 3, "epochs": args.repeats + 2}


def size_of(args: Namespace) -> tuple[str, ...]:
    """Return the arguments of the script that say how much it trains, and its pace while nodes are missing."""
    return (*(f"--{name}={count}" for name, count in counts_of(args).items()), f"--pace={args.pace}")


def train_undisturbed(setup: Setup, place: Scratch, size: tuple[str, ...]) -> Path | None:
    """Return the folder of an undisturbed run; None if it failed."""
    folder = place.files / f"undisturbed-{setup.sharded}"
    folder.mkdir()
    try:
        run_undisturbed(setup, folder, place.arenas, size)
    except (NodesLostError, subprocess.TimeoutExpired) as error:
        console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
        return None
    return folder


def train(setup: Setup, args: Namespace, place: Scratch, chance: random.Random, undisturbed: Path | None) -> Found:
    """Run one job with `args.repeats` losses and returns, then count samples and compare weights."""
    folder = place.files / f"job-{SETUPS.index(setup)}"
    folder.mkdir()
    found: Found = {"cycles": [], "failed": ""}
    bound = THEIRS if setup.checkpoint_every else bound_of(args)
    with Nodes(setup, folder, place.arenas, size_of(args), bound) as nodes:
        try:
            for number in range(MAX_NODES):
                nodes.start(number)
            after = 0.0
            for number in range(args.repeats):
                found["cycles"].append(cycle(nodes, 1 + number % (MAX_NODES - 1), chance, after))
                after = found["cycles"][-1]["full_at"]
            nodes.wait()
            counted = tally(Rows(folder).look(), **counts_of(args))
            found |= {"due": counted.due, "twice": counted.twice, "never": counted.never}
            if undisturbed is not None:
                found |= {"weight": furthest(folder, undisturbed), "loss": furthest_loss(folder, undisturbed)}
        except (NodesLostError, subprocess.TimeoutExpired) as error:
            console.print(f"{setup.name}: {error}", markup=False)
            found["failed"] = str(error)
        if not setup.checkpoint_every:
            add_ledger(found["cycles"], nodes.events())
    return found


def bound_of(args: Namespace) -> Bound | None:
    """Return how long our nodes may be silent; None for the defaults."""
    if args.keep_alive_interval is None:
        return None
    return Bound(args.keep_alive_interval, args.keep_alive_max_attempt)


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
            return sum(step.world == world and step.at > since for step in finished(nodes.seen.look())) >= steps or None

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
    steps = finished(nodes.seen.look())
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


def add_ledger(cycles: list[Found], events: tuple[Event, ...]) -> None:
    """Add to every cycle what the ledger recorded about it."""
    for found in cycles:
        kinds = {"shrink": (found["killed_at"], found["came_at"]), "grow": (found["came_at"], found["full_at"] + 5.0)}
        for kind, (begin, end) in kinds.items():
            within = [(event, event.at - begin) for event in events if begin < event.at < end]
            accounts = [event.fields for event, _ in within if event.event == "recovery"]
            found[kind]["events"] = [(event.event, round(at, 3), event.fields.get("node")) for event, at in within]
            for mark, name in MARKS.items():
                moments = [at for event, at in within if event.event == name]
                found[kind] |= {mark: min(moments)} if moments else {}
            found[kind] |= {"ledger": accounts[0]} if accounts else {}


def phases_of(lost: Found) -> Found:
    """Return the time of each phase of a loss in seconds, from the moments that the ledger recorded."""
    moments = [0.0, *(lost.get(mark) for mark in MARKS), lost["seconds"]]
    if None in moments:
        return {}
    return dict(zip(LOSS_PHASES, (end - begin for begin, end in pairwise(moments)), strict=True))


def furthest(left: Path, right: Path) -> float:
    """Return the largest difference of a weight."""
    a, b = (torch.load(folder / "end.pt") for folder in (left, right))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def furthest_loss(left: Path, right: Path) -> float:
    """Return the largest relative difference of an epoch's loss."""
    a, b = (losses(folder) for folder in (left, right))
    return max(abs(a[epoch] - b[epoch]) / b[epoch] for epoch in a)


def losses(folder: Path) -> dict[int, float]:
    """Return the loss by epoch; the last row of an epoch counts."""
    rows = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return {row["epoch"]: row["loss"] for row in rows}


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
LEDGER = (
    HOW,
    Column("change", fact("change")),
    Column("recovery", lambda group: ", ".join(sorted({one["ledger"]["rung"] for one in group.items}))),
    *map(phase, (*PHASES, "total_s")),
)
LEDGER_NOTE = (
    "detect: from the last heartbeat of the lost node until the ranks are notified, or ended, which is after the "
    "agents have re-rendezvoused; zero at the return of a node, since no rank is lost then."
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
    Column("of an epoch's loss, relative", fact("loss"), ".1e"),
)
SAMPLES_NOTE = (
    "Counted from what each rank has recorded, without the steps that were rolled back. Repeated: a sample that an "
    "epoch uses a second time. Skipped: a sample that an epoch does not use."
)


def shrink_notes(setups: Mapping[str, Found], bound: Bound | None) -> list[str]:
    limit = "the defaults"
    if bound is not None:
        limit = f"keep_alive_interval={bound.interval_s} x keep_alive_max_attempt={bound.attempts}"
    ours = (
        f"A node whose agent's connection was closed is lost after at least 1 s without a heartbeat, any other after "
        f"the limit ({limit}) plus one interval. Detected: the ledger's `node_lost`."
    )
    theirs = (
        "torchrun's agents do not report when they detect the loss: their workers fail immediately, and the rendezvous "
        f"waits {THEIRS.interval_s * THEIRS.attempts} s before it removes the lost node."
    )
    failed = [f"{name}: {found['failed'].splitlines()[0]}" for name, found in setups.items() if found["failed"]]
    return [ours, theirs, *failed]


def loss_phases(losses_of: list[Group]) -> list[tuple[str, list[Group]]]:
    """Return the phases of the losses of each setup that has a ledger."""
    found = []
    for group in losses_of:
        losses = [phases for lost in group.items if (phases := phases_of(lost))]
        if losses:
            found.append((group.name, [Group(phase, [one[phase] for one in losses]) for phase in LOSS_PHASES]))
    return found


def tables(args: Namespace, results: Results) -> list[Table]:
    setups: dict[str, Found] = results["setups"]
    losses_of, returns_of = (
        [Group(setup, [cycle[kind] for cycle in found["cycles"]], found) for setup, found in setups.items()]
        for kind in ("shrink", "grow")
    )
    ledger = [
        Group(group.name, with_ledger, {"change": change})
        for lost, came in zip(losses_of, returns_of, strict=True)
        for group, change in ((lost, "4 to 3"), (came, "3 to 4"))
        if (with_ledger := [one for one in group.items if "ledger" in one])
    ]
    counted = [group for group in losses_of if "due" in group.context]
    kill = "A node of four is killed, to the first step finished by all of the other three"
    samples = "Samples used in all epochs, and the result compared with an undisturbed run"
    returned = [group for group in returns_of if group.items]
    paused = "Paused: from the last step of three ranks to the first of four, slowest rank."
    return [
        Table.of(kill, losses_of, *SHRINK, notes=shrink_notes(setups, bound_of(args))),
        *(
            Table.of(f"Phases of a loss: {name}", rows, *LOSS, notes=[LOSS_NOTE])
            for name, rows in loss_phases(losses_of)
        ),
        Table.of("Phases according to the ledger, medians in s", ledger, *LEDGER, notes=[LEDGER_NOTE]),
        Table.of("The node rejoins", returned, *GROW, notes=[paused]),
        Table.of(samples, counted, *SAMPLES, notes=[SAMPLES_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    add_count(parser, "--repeats", Default(3, 1), "kills of each setup")
    add_count(parser, "--steps", 300, "steps per epoch")
    about = "seconds between two steps while a node is missing (default: %(default)s)"
    parser.add_argument("--pace", type=float, default=0.1, help=about)
    about = "keep_alive_interval of the rendezvous, in s (default: that of ckptless run)"
    parser.add_argument("--keep-alive-interval", type=int, help=about)
    add_count(parser, "--keep-alive-max-attempt", 3, "keep_alive_max_attempt, together with --keep-alive-interval")
    add_count(parser, "--seed", 1, "seed of the moments")
    add_choice(parser, "--only", [setup.name for setup in SETUPS], "setups")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
