"""Bits that flip in the memory of a rank: how many are found at the next version, named and healed.

A small GPT trains on three ranks, each of which keeps a copy of all shards. After every few steps, a random bit of a
random element of a parameter or a moment changes on a random rank. The ledger says what was found. The run is compared
with one without flips, by a fingerprint of weights and moments after every step.
"""

from __future__ import annotations

import random
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.processes import Command, ckptless_run, job_environment, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, read_ledger
from lightning_ckptless.protocol.fault_script import Fault, FaultKind, Moment

RANKS = 3
FIRST_STEP, EVERY_STEPS = 4, 3
FLIPS_OF_A_RUN = 250
"""Flips of one process: the list of all faults is an environment variable, which the kernel limits."""
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FOUND_TARGET = 0.999


def tensors_of(size: str) -> dict[str, int]:
    """Return the names of the model's parameters and their numbers of elements."""
    # Not imported above: torch is not needed for the options and tables.
    from benchmarks.jobs.training import Trained  # noqa: PLC0415

    return {name: parameter.numel() for name, parameter in Trained(size).named_parameters()}


def random_flips(count: int, tensors: dict[str, int], draw: random.Random) -> list[Fault]:
    """Return flips at every few steps. Every kind of tensor is hit equally often, and every element of a kind is."""
    flips = []
    names, weights = list(tensors), list(tensors.values())
    for index in range(count):
        [name] = draw.choices(names, weights)
        kind = KINDS[index % len(KINDS)]
        flips.append(
            Fault(
                FaultKind.FLIP,
                draw.randrange(RANKS),
                FIRST_STEP + EVERY_STEPS * index,
                Moment.COMMIT,
                tensor=f"parameter/{name}" if kind == "parameter" else f"optimizer/0/{name}/{kind}",
                element=draw.randrange(tensors[name]),
                bit=draw.randrange(32),
            )
        )
    return flips


def train(size: str, steps: int, flips: list[Fault]) -> dict[str, Any]:
    """Train once.

    Returns:
        The fingerprints of the last pass over each step, by rank and step, and the events of the ledger.
    """
    strategy = {"failure_domain": "rank", "copies": RANKS - 1}
    job = JobOptions(size=size, strategy="ckptless", strategy_options=strategy, devices=RANKS, steps=steps)
    fingerprints: dict[str, int] = {}
    with scratch() as folders, tempfile.TemporaryDirectory(prefix="ckptless-") as short:
        with Inbox(Path(short) / "socket") as inbox:
            variables = {
                **job_environment(inbox.path),
                environment.FAULTS: ",".join(map(str, flips)),
                environment.RUN_ROOT: str(folders.files / "runs"),
                environment.ARENA_DIR: str(folders.arenas),
            }
            with Command(ckptless_run()(job), folders.files, variables) as command:
                while command.running:
                    note = inbox.next(0.5)
                    if note is not None and note.moment == "step":
                        fingerprints[f"{note.rank} {note.fields['step']}"] = note.fields["fingerprint"]
                if command.wait(1.0):
                    raise RuntimeError(f"the job has failed:\n{command.output_tail()}")
        [ledger] = (folders.files / "runs").glob(f"*/{LEDGER_NAME}")
        events = [event for event in read_ledger(ledger) if event.event in ("divergence", "rewind")]
    return {
        "fingerprints": fingerprints,
        "divergences": [event.fields for event in events if event.event == "divergence"],
        "rewinds": [event.fields for event in events if event.event == "rewind"],
    }


def outcome_of(flip: Fault, divergences: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of a flip."""
    found = [each for each in divergences if each["step"] == flip.step]
    return {
        "flip": str(flip),
        "kind": next(kind for kind in reversed(KINDS) if kind in flip.tensor),
        "found": len(found) == 1,
        "named": any(each["wrong"] == [flip.rank] for each in found),
        "located": any([name.partition("[")[0] for name in each["tensors"]] == [flip.tensor] for each in found),
    }


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train with flips and without, as often as the number of flips requires."""
    draw, tensors = random.Random(args.seed), tensors_of(args.size)
    left, results["flips"], results["rewind_s"] = args.flips, [], []
    results["differing_steps"] = results["steps"] = results["unexpected"] = 0
    steps.expect(args.flips)
    while left:
        count = min(left, FLIPS_OF_A_RUN)
        left -= count
        flips = random_flips(count, tensors, draw)
        last = flips[-1].step + EVERY_STEPS
        steps.begin(f"{args.size}: {last} steps without flips")
        right = train(args.size, last, [])["fingerprints"]
        steps.begin(f"{args.size}: {count} flips in {last} steps")
        found = train(args.size, last, flips)
        results["flips"] += [outcome_of(flip, found["divergences"]) for flip in flips]
        results["unexpected"] += len(found["divergences"]) - count
        results["rewind_s"] += [rewind["took_s"] for rewind in found["rewinds"]]
        results["steps"] += len(right)
        results["differing_steps"] += sum(found["fingerprints"].get(step) != value for step, value in right.items())
        steps.done(count)


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return a table with a row for each kind of tensor."""
    flips = results["flips"]
    rows = [(kind, [flip for flip in flips if flip["kind"] == kind]) for kind in KINDS] + [("all", flips)]

    def share(name: str) -> Column:
        return Column(name, lambda row: f"{sum(flip[name] for flip in row[1])} of {len(row[1])}")

    columns = (Column("tensor", lambda row: row[0]), share("found"), share("named"), share("located"))
    part = sum(flip["found"] for flip in flips) / len(flips)
    word = "met" if part >= FOUND_TARGET else "missed"
    differing = f"{results['differing_steps']} of {results['steps']}"
    notes = [
        f"Found at the next version: {part:.2%} (target {FOUND_TARGET:.1%}): {word}",
        f"Differences that no flip explains: {results['unexpected']}",
        f"Steps of all ranks that differ from the run without flips: {differing}",
    ]
    if results["rewind_s"]:
        notes.append(f"Going back: median {median(results['rewind_s']):.3f} s")
    return [Table.of(f"Bits flipped in the {args.size} model on {RANKS} ranks", rows, *columns, notes=notes)]


def options(parser: ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", default="tiny", help="model size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the flips (default: %(default)s)")
    add_count(parser, "--flips", Default(1000, 12), "number of flips")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
