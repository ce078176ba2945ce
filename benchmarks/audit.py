"""Silent data corruption: bits that flip in the memory of a rank, and ranks that compute wrongly. How many are found?

A small GPT trains on three ranks, each of which keeps a copy of all shards. After every few steps

- a random bit of a random element of a parameter or a moment changes on a random rank, or
- all matrix products of a random rank are wrong from then on, until its process is replaced. Every second step is
  checked by a replay.

The ledger says what was found. The run is compared with one without faults, by a fingerprint of weights and moments
after every step.
"""

from __future__ import annotations

import random
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from time import perf_counter
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
FLIPS_OF_A_RUN, WRONG_OF_A_RUN = 250, 25
"""Faults of one run: the list of all of them is an environment variable, which the kernel limits."""
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FLIPS_TARGET = 0.999
STEPS_PER_CHECK, STEPS_PER_WRONG = 2, 6
WRONG_TARGET = 1.0
REPLICAS: dict[str, Any] = {"failure_domain": "rank", "copies": RANKS - 1}
CHECKED = REPLICAS | {
    "replay_check_every": STEPS_PER_CHECK,
    "history": 2,
    "history_every": STEPS_PER_CHECK,
    "max_recoveries_per_hour": 1_000_000,
}


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


def random_wrongs(count: int, draw: random.Random) -> list[Fault]:
    """Return ranks that compute wrongly, one after another, in steps that are checked and in others."""
    steps = (FIRST_STEP + STEPS_PER_WRONG * index + draw.randrange(STEPS_PER_CHECK) for index in range(count))
    return [Fault(FaultKind.WRONG, draw.randrange(RANKS), step) for step in steps]


def train(size: str, steps: int, strategy: dict[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """Train once.

    Returns:
        The fingerprints of the last pass over each step, by rank and step, and the events of the ledger.
    """
    job = JobOptions(size=size, strategy="ckptless", strategy_options=strategy, devices=RANKS, steps=steps)
    fingerprints: dict[str, int] = {}
    with scratch() as folders, tempfile.TemporaryDirectory(prefix="ckptless-") as short:
        with Inbox(Path(short) / "socket") as inbox:
            variables = {
                **job_environment(inbox.path),
                environment.FAULTS: ",".join(map(str, faults)),
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


def outcome_of_flip(flip: Fault, divergences: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of a flip."""
    found = [each for each in divergences if each["step"] == flip.step]
    return {
        "fault": str(flip),
        "kind": next(kind for kind in reversed(KINDS) if kind in flip.tensor),
        "found": len(found) == 1,
        "named": any(each["wrong"] == [flip.rank] for each in found),
        "located": any([name.partition("[")[0] for name in each["tensors"]] == [flip.tensor] for each in found),
        "explained": len(found),
    }


def outcome_of_wrong(wrong: Fault, divergences: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of a rank that computes wrongly from a step on."""
    # The check of a step comes before it, so a rank that is wrong from a step to check on is found in it.
    reach = range(wrong.step - 1, wrong.step - 1 + STEPS_PER_CHECK)
    first = next((at for at, each in enumerate(divergences) if each["step"] in reach), len(divergences))
    found = divergences[first : first + 2]
    return {
        "fault": str(wrong),
        "kind": "wrong",
        "found": bool(found),
        "named": [each["wrong"] for each in found] == [[wrong.rank]] * 2,
        "located": [each["consequence"] for each in found] == ["go_back", "replace"],
        "explained": len(found),
    }


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train with faults and without, as often as the number of faults requires."""
    draw, tensors = random.Random(args.seed), tensors_of(args.size)
    results.update(faults=[], rewind_s=[], differing_steps=0, steps=0, unexpected=0, took_s={"flip": 0.0, "wrong": 0.0})
    steps.expect(args.flips + args.wrong)
    for count in _parts(args.wrong, WRONG_OF_A_RUN):
        _measure_run(args.size, random_wrongs(count, draw), results, steps)
    for count in _parts(args.flips, FLIPS_OF_A_RUN):
        _measure_run(args.size, random_flips(count, tensors, draw), results, steps)


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - done) for done in range(0, total, most)]


def _measure_run(size: str, faults: list[Fault], results: Results, steps: Steps) -> None:
    kind = faults[0].kind
    is_flip = kind is FaultKind.FLIP
    last, strategy = faults[-1].step + STEPS_PER_WRONG, REPLICAS if is_flip else CHECKED
    steps.begin(f"{size}: {last} steps without faults")
    right = train(size, last, strategy, [])["fingerprints"]
    steps.begin(f"{size}: {len(faults)} faults ({kind}) in {last} steps")
    began = perf_counter()
    found = train(size, last, strategy, faults)
    results["took_s"][str(kind)] += perf_counter() - began
    outcome_of = outcome_of_flip if is_flip else outcome_of_wrong
    outcomes = [outcome_of(fault, found["divergences"]) for fault in faults]
    results["faults"] += outcomes
    results["unexpected"] += len(found["divergences"]) - sum(each["explained"] for each in outcomes)
    results["rewind_s"] += [rewind["took_s"] for rewind in found["rewinds"]]
    results["steps"] += len(right)
    results["differing_steps"] += sum(found["fingerprints"].get(step) != value for step, value in right.items())
    steps.done(len(faults))


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return a row for each kind of fault."""
    found = results["faults"]
    flips, wrong = ([each for each in found if (each["kind"] == "wrong") is is_wrong] for is_wrong in (False, True))
    rows = [(f"bit of {kind}", [each for each in flips if each["kind"] == kind], FLIPS_TARGET) for kind in KINDS]
    rows += [("any bit", flips, FLIPS_TARGET), ("matrix products of a rank", wrong, WRONG_TARGET)]

    def share(head: str, name: str) -> Column:
        return Column(head, lambda row: f"{sum(each[name] for each in row[1])} of {len(row[1])}")

    columns = (
        Column("wrong", lambda row: row[0]),
        share("found", "found"),
        share("rank named", "named"),
        share("located or replaced", "located"),
        Column("target", lambda row: f"{row[2]:.1%}"),
        Column("result", lambda row: _result(row[1], row[2])),
    )
    seconds, parts = results["took_s"], {"flip": flips, "wrong": wrong}
    differing = f"{results['differing_steps']} of {results['steps']}"
    notes = [
        f"Differences that no fault explains: {results['unexpected']}",
        f"Steps of all ranks that differ from the run without faults: {differing}",
        *(f"{len(part)} faults ({kind}) in {seconds[kind]:.0f} s" for kind, part in parts.items()),
    ]
    if results["rewind_s"]:
        notes.append(f"Going back: median {median(results['rewind_s']):.3f} s")
    title = f"Silent data corruption in the {args.size} model on {RANKS} ranks"
    return [Table.of(title, [row for row in rows if row[1]], *columns, notes=notes)]


def _result(outcomes: list[dict[str, Any]], target: float) -> str:
    part = sum(each["found"] and each["named"] for each in outcomes) / len(outcomes)
    return f"{part:.1%}: {'met' if part >= target else 'missed'}"


def options(parser: ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", default="tiny", help="model size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults (default: %(default)s)")
    add_count(parser, "--flips", Default(1000, 12), "number of flips")
    add_count(parser, "--wrong", Default(100, 3), "number of ranks that compute wrongly")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
