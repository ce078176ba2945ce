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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.elastic_nodes import MAX_NODES, Bound, Nodes, NodesLostError, Setup, run_undisturbed
from benchmarks.elastic_tables import exactness_table, grow_table, phases_table, shrink_table
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.samples import Row, Rows, Step, finished, first_of, last_before, tally
from benchmarks.scratch import Scratch, scratch
from lightning_ckptless.ledger import Event

EVERY = 50
"""Steps between two checkpoint files in torchrun's row."""
START_S = 180.0
TIMEOUT_S = 120.0
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
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a job trains.

    Args:
        samples: size of the dataset.
        epochs: number of epochs.
        pace_s: seconds added to each step while nodes are missing.
    """

    samples: int
    epochs: int
    pace_s: float

    @property
    def words(self) -> tuple[str, ...]:
        """Arguments of the script."""
        return f"--samples={self.samples}", f"--epochs={self.epochs}", f"--pace={self.pace_s}"


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

    def made(world: int, steps: int, since: float) -> bool | None:
        return sum(step.world == world and step.at > since for step in finished(nodes.seen.look())) >= steps or None

    begin = SPARE_STEPS + chance.randrange(RANDOM_STEPS)
    nodes.until(lambda _: made(MAX_NODES, begin, after), START_S, f"{begin} steps of {MAX_NODES} ranks")
    slowed_at = nodes.slow_down()
    nodes.until(lambda _: made(MAX_NODES, SPARE_STEPS, slowed_at), START_S, "steps at the slower pace")
    killed_at = nodes.kill(victim)
    small = nodes.until(
        lambda rows: _first(rows, MAX_NODES - 1, killed_at), TIMEOUT_S, f"a step of {MAX_NODES - 1} ranks"
    )
    nodes.until(
        lambda _: made(MAX_NODES - 1, SPARE_STEPS, killed_at), TIMEOUT_S, f"more steps of {MAX_NODES - 1} ranks"
    )
    came_at = nodes.start(victim)
    full = nodes.until(lambda rows: _first(rows, MAX_NODES, came_at), TIMEOUT_S, f"a step of {MAX_NODES} ranks again")
    nodes.speed_up()
    steps = finished(nodes.seen.look())
    return {
        "victim": victim, "killed_at": killed_at, "came_at": came_at, "full_at": full.at,
        "shrink": shrunk(steps, killed_at, small), "grow": grown(steps, came_at, full),
    }  # fmt: skip


def _first(rows: list[Row], world: int, after: float) -> Step | None:
    return first_of(finished(rows), world, after=after)


def shrunk(steps: list[Step], killed_at: float, small: Step) -> Found:
    """Return the cost of losing a node.

    Args:
        steps: finished steps, by time.
        killed_at: wall clock of the kill.
        small: first step of the remaining nodes.
    """
    before = [step for step in steps if step.at < killed_at][-SPARE_STEPS:]
    took_s = [after.at - at.at for at, after in pairwise(before)]
    return {
        "seconds": small.at - killed_at,
        "step_s": median(took_s),
        "repeated_steps": before[-1].number + 1 - small.number,
    }


def grown(steps: list[Step], came_at: float, full: Step) -> Found:
    """Return the cost of a node's return to the others.

    Args:
        steps: finished steps, by time.
        came_at: wall clock at which its agent was started.
        full: first step of all nodes.
    """
    last = last_before(steps, full.at)
    return {
        "paused_s": full.at - last.at,
        "seconds": full.at - came_at,
        "steps_meanwhile": sum(came_at < step.at <= last.at for step in steps),
        "repeated_steps": last.number + 1 - full.number,
    }


def with_accounts(cycles: list[Found], events: tuple[Event, ...]) -> None:
    """Add to every cycle what the ledger recorded about it."""
    for found in cycles:
        kinds = {"shrink": (found["killed_at"], found["came_at"]), "grow": (found["came_at"], found["full_at"] + 5.0)}
        for kind, (begin, end) in kinds.items():
            within = [event for event in events if begin < event.at < end]
            noticed = [event.at - begin for event in within if event.event == "node_lost"]
            accounts = [event.fields for event in within if event.event == "recovery"]
            found[kind]["events"] = [
                (event.event, round(event.at - begin, 3), event.fields.get("node")) for event in within
            ]
            found[kind] |= {"noticed_s": min(noticed)} if noticed else {}
            found[kind] |= {"ledger": accounts[0]} if accounts else {}


def job(setup: Setup, args: Any, size: Size, place: Scratch, chance: random.Random, undisturbed: Path | None) -> Found:
    """Run one job with `args.repeats` losses and returns, then count samples and compare weights.

    Args:
        setup: how the job continues without a node.
        args: options of the command line.
        size: how much the job trains.
        place: folders for its files and arenas.
        chance: random generator for the moments.
        undisturbed: folder of the undisturbed run; None if there is nothing to compare with.
    """
    folder = place.files / f"job-{SETUPS.index(setup)}"
    folder.mkdir()
    found: Found = {"cycles": [], "failed": ""}
    bound = Bound(args.keep_alive_interval, args.keep_alive_max_attempt)
    with Nodes(setup, folder, place.arenas, size.words, bound) as nodes:
        try:
            for number in range(MAX_NODES):
                nodes.start(number)
            after = 0.0
            for number in range(args.repeats):
                found["cycles"].append(cycle(nodes, 1 + number % (MAX_NODES - 1), chance, after))
                after = found["cycles"][-1]["full_at"]
            nodes.wait()
            found |= ended(folder, undisturbed, size)
        except (NodesLostError, subprocess.TimeoutExpired) as error:
            console.print(f"{setup.name}: {error}", markup=False)
            found["failed"] = str(error)
        if not setup.checkpoint_every:
            with_accounts(found["cycles"], nodes.events())
    return found


def ended(folder: Path, undisturbed: Path | None, size: Size) -> Found:
    """Return the results of a job that has ended: samples, weights, losses."""
    counted = tally(Rows(folder).look(), samples=size.samples, epochs=size.epochs)
    found: Found = {"due": counted.due, "twice": counted.twice, "never": counted.never}
    if undisturbed is not None:
        found |= {"weight": furthest(folder, undisturbed), "loss": furthest_loss(folder, undisturbed)}
    return found


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


def run(args: Any, results: dict[str, Found], progress: Progress) -> None:
    """Measure every setup, and store the results as they arrive."""
    setups = [setup for setup in SETUPS if not args.only or setup.name in args.only]
    size = Size(args.steps * MAX_NODES * 3, args.repeats + 2, args.pace)
    chance = random.Random(args.seed)
    task = progress.add_task("", total=len(setups) + 2)
    with scratch() as place:
        undisturbed: dict[bool, Path | None] = {False: None, True: None}
        for sharded in undisturbed:
            progress.update(task, description=f"undisturbed, {'FSDP2' if sharded else 'DDP'}")
            if any(setup.sharded == sharded for setup in setups):
                undisturbed[sharded] = _undisturbed(sharded, place, size)
            progress.advance(task)
        for setup in setups:
            progress.update(task, description=setup.name)
            results[setup.name] = job(setup, args, size, place, chance, undisturbed[setup.sharded])
            progress.advance(task)


def _undisturbed(sharded: bool, place: Scratch, size: Size) -> Path | None:
    folder = place.files / f"undisturbed-{'fsdp2' if sharded else 'ddp'}"
    folder.mkdir()
    try:
        run_undisturbed(Setup("", sharded=sharded), folder, place.arenas, size.words)
    except (NodesLostError, subprocess.TimeoutExpired) as error:
        console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
        return None
    return folder


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="kills of each setup (default: 3; 1 with --quick)")
    parser.add_argument("--steps", type=int, default=300, help="steps per epoch (default: 300)")
    parser.add_argument(
        "--pace", type=float, default=0.1, help="seconds between two steps while a node is missing (default: 0.1)"
    )
    parser.add_argument(
        "--keep-alive-interval", type=int, default=1, help="keep_alive_interval of the rendezvous, in s (default: 1)"
    )
    parser.add_argument(
        "--keep-alive-max-attempt", type=int, default=4, help="keep_alive_max_attempt of the rendezvous (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments (default: 1)")
    parser.add_argument("--only", nargs="+", choices=[setup.name for setup in SETUPS], help="setups (default: all)")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    report = Report(args)
    results: dict[str, Found] = {}
    try:
        with progress_bar() as progress:
            run(args, results, progress)
    finally:
        # An interrupted run still reports what was measured until then.
        bound = Bound(args.keep_alive_interval, args.keep_alive_max_attempt)
        tables = [shrink_table(results, bound), phases_table(results), grow_table(results), exactness_table(results)]
        report.finish(tables, {"setups": results})


if __name__ == "__main__":
    main()
