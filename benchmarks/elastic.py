"""A node of four is killed, the others go on without it, and it comes back: how long that takes, and what is trained.

Four agents of one CPU rank each, on loopback, `--nnodes 3:4`. Again and again the agent of a node and its worker are
killed and its shared memory is removed; another agent is started in its place when the others go on. Beside our
strategy stands torchrun with Lightning's ddp and a checkpoint file that every start resumes. In the end all that the
ranks have trained on is counted, and the weights are compared with those of a run that nobody left. The first node,
with rank 0, is spared. Takes a quarter of an hour.
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

from benchmarks.elastic_nodes import MOST, Bound, Nodes, NodesLostError, Way, left_alone
from benchmarks.elastic_tables import exactness_table, grow_table, phases_table, shrink_table
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.samples import Row, Rows, Step, finished, first_of, last_before, tally
from benchmarks.scratch import Scratch, scratch
from lightning_ckptless.ledger import Event

EVERY = 50
"""Steps between two checkpoint files of torchrun's row."""
START_S = 180.0
TIMEOUT_S = 120.0
SPARE_STEPS = 10
"""That a world makes before the next thing happens to it."""
RANDOM_STEPS = 50

WAYS = (
    Way("DDP, in place"),
    Way("DDP, --no-in-place", flags=("--no-in-place",)),
    Way("FSDP2, in place", sharded=True),
    Way('DDP, in place, elastic_batch="scale"', ("--strategy-options={'elastic_batch': 'scale'}",)),
    Way(f"torchrun, ddp + ModelCheckpoint({EVERY})", checkpoint_every=EVERY),
)
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a job trains.

    Args:
        samples: of the data set.
        epochs: of the job.
        pace_s: beyond the length of a step while nodes are missing.
    """

    samples: int
    epochs: int
    pace_s: float

    @property
    def words(self) -> tuple[str, ...]:
        """For the script."""
        return f"--samples={self.samples}", f"--epochs={self.epochs}", f"--pace={self.pace_s}"


def cycle(nodes: Nodes, victim: int, chance: random.Random, after: float) -> Found:
    """Kill a node, wait until the others go on, start it again, and wait until all go on.

    Args:
        nodes: of a job that trains.
        victim: the node.
        chance: of the moment.
        after: moment from which on steps of all nodes count.

    Raises:
        NodesLostError: the others did not go on, or all did not.
    """

    def made(world: int, steps: int, since: float) -> bool | None:
        return sum(step.world == world and step.at > since for step in finished(nodes.seen.look())) >= steps or None

    begin = SPARE_STEPS + chance.randrange(RANDOM_STEPS)
    nodes.until(lambda _: made(MOST, begin, after), START_S, f"{begin} steps of {MOST} ranks")
    slowed_at = nodes.slow_down()
    nodes.until(lambda _: made(MOST, SPARE_STEPS, slowed_at), START_S, "steps at the slower pace")
    killed_at = nodes.kill(victim)
    small = nodes.until(lambda rows: _first(rows, MOST - 1, killed_at), TIMEOUT_S, f"a step of {MOST - 1} ranks")
    nodes.until(lambda _: made(MOST - 1, SPARE_STEPS, killed_at), TIMEOUT_S, f"more steps of {MOST - 1} ranks")
    came_at = nodes.start(victim)
    full = nodes.until(lambda rows: _first(rows, MOST, came_at), TIMEOUT_S, f"a step of {MOST} ranks again")
    nodes.speed_up()
    steps = finished(nodes.seen.look())
    return {
        "victim": victim, "killed_at": killed_at, "came_at": came_at, "full_at": full.at,
        "shrink": shrunk(steps, killed_at, small), "grow": grown(steps, came_at, full),
    }  # fmt: skip


def _first(rows: list[Row], world: int, after: float) -> Step | None:
    return first_of(finished(rows), world, after=after)


def shrunk(steps: list[Step], killed_at: float, small: Step) -> Found:
    """What the loss of a node has cost.

    Args:
        steps: finished ones, in the order of time.
        killed_at: wall clock.
        small: first step of those that are left.
    """
    before = [step for step in steps if step.at < killed_at][-SPARE_STEPS:]
    took_s = [after.at - at.at for at, after in pairwise(before)]
    return {
        "seconds": small.at - killed_at,
        "step_s": median(took_s),
        "repeated_steps": before[-1].number + 1 - small.number,
    }


def grown(steps: list[Step], came_at: float, full: Step) -> Found:
    """What the return of a node has cost the others.

    Args:
        steps: finished ones, in the order of time.
        came_at: when its agent was started, wall clock.
        full: first step of all.
    """
    last = last_before(steps, full.at)
    return {
        "still_s": full.at - last.at,
        "seconds": full.at - came_at,
        "steps_meanwhile": sum(came_at < step.at <= last.at for step in steps),
        "repeated_steps": last.number + 1 - full.number,
    }


def with_accounts(cycles: list[Found], events: tuple[Event, ...]) -> None:
    """Put down with every cycle what the ledger says of it, where there is one."""
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


def job(way: Way, args: Any, size: Size, place: Scratch, chance: random.Random, alone: Path | None) -> Found:
    """One job with so many losses and returns, then counted and compared.

    Args:
        way: how it goes on.
        args: of the command line.
        size: how much it trains.
        place: for its files.
        chance: of moments.
        alone: folder of the run that nobody left; None where there is nothing to compare with.
    """
    folder = place.files / f"job-{WAYS.index(way)}"
    folder.mkdir()
    found: Found = {"cycles": [], "failed": ""}
    bound = Bound(args.keep_alive_interval, args.keep_alive_max_attempt)
    with Nodes(way, folder, place.arenas, size.words, bound) as nodes:
        try:
            for number in range(MOST):
                nodes.start(number)
            after = 0.0
            for number in range(args.repeats):
                found["cycles"].append(cycle(nodes, 1 + number % (MOST - 1), chance, after))
                after = found["cycles"][-1]["full_at"]
            nodes.wait()
            found |= ended(folder, alone, size)
        except (NodesLostError, subprocess.TimeoutExpired) as error:
            console.print(f"{way.name}: {error}", markup=False)
            found["failed"] = str(error)
        if not way.checkpoint_every:
            with_accounts(found["cycles"], nodes.events())
    return found


def ended(folder: Path, alone: Path | None, size: Size) -> Found:
    """What came of a job that has ended: samples, weights, losses."""
    counted = tally(Rows(folder).look(), samples=size.samples, epochs=size.epochs)
    found: Found = {"due": counted.due, "twice": counted.twice, "never": counted.never}
    if alone is not None:
        found |= {"weight": furthest(folder, alone), "loss": furthest_loss(folder, alone)}
    return found


def furthest(left: Path, right: Path) -> float:
    """The largest difference of a weight."""
    a, b = (torch.load(folder / "end.pt") for folder in (left, right))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def furthest_loss(left: Path, right: Path) -> float:
    """The largest difference of an epoch's loss, relative to it."""
    a, b = (losses(folder) for folder in (left, right))
    return max(abs(a[epoch] - b[epoch]) / b[epoch] for epoch in a)


def losses(folder: Path) -> dict[int, float]:
    """Loss by epoch; what was written last counts."""
    rows = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return {row["epoch"]: row["loss"] for row in rows}


def run(args: Any, results: dict[str, Found], progress: Progress) -> None:
    """Measure every way, into the results."""
    ways = [way for way in WAYS if not args.only or way.name in args.only]
    size = Size(args.steps * MOST * 3, args.repeats + 2, args.pace)
    chance = random.Random(args.seed)
    task = progress.add_task("", total=len(ways) + 2)
    with scratch() as place:
        alone: dict[bool, Path | None] = {False: None, True: None}
        for sharded in alone:
            progress.update(task, description=f"nobody killed, {'FSDP2' if sharded else 'DDP'}")
            if any(way.sharded == sharded for way in ways):
                alone[sharded] = _alone(sharded, place, size)
            progress.advance(task)
        for way in ways:
            progress.update(task, description=way.name)
            results[way.name] = job(way, args, size, place, chance, alone[way.sharded])
            progress.advance(task)


def _alone(sharded: bool, place: Scratch, size: Size) -> Path | None:
    folder = place.files / f"alone-{'fsdp2' if sharded else 'ddp'}"
    folder.mkdir()
    try:
        left_alone(Way("", sharded=sharded), folder, place.arenas, size.words)
    except (NodesLostError, subprocess.TimeoutExpired) as error:
        console.print(f"nothing to compare with: {error}", markup=False)
        return None
    return folder


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="kills of each way (default: 3; 1 with --quick)")
    parser.add_argument("--steps", type=int, default=300, help="of an epoch (default: 300)")
    parser.add_argument(
        "--pace", type=float, default=0.1, help="seconds between two steps while a node is missing (default: 0.1)"
    )
    parser.add_argument("--keep-alive-interval", type=int, default=1, help="of the rendezvous, in s (default: 1)")
    parser.add_argument("--keep-alive-max-attempt", type=int, default=4, help="of the rendezvous (default: 4)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--only", nargs="+", choices=[way.name for way in WAYS], help="ways (default: all)")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    report = Report(args)
    results: dict[str, Found] = {}
    try:
        with progress_bar() as progress:
            run(args, results, progress)
    finally:
        # Whoever ends it early has what was measured until then.
        bound = Bound(args.keep_alive_interval, args.keep_alive_max_attempt)
        tables = [shrink_table(results, bound), phases_table(results), grow_table(results), exactness_table(results)]
        report.finish(tables, {"ways": results})


if __name__ == "__main__":
    main()
