"""The cost of durable states to training, and the time until one is on disk, compared with torch's `async_save`.

Two ranks of the same job train under each variant. The variants run at the same time and alternate in short segments.
Each writes the same state to the same disk equally often: the durable writer reads the arena while training continues;
`torch.distributed.checkpoint.async_save` copies the state in the training thread and writes it in another thread.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.async_save import NOTES
from benchmarks.gpt import WIDTHS
from benchmarks.job import JobOptions
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.steady_state import state_bytes
from benchmarks.tables import Table
from benchmarks.threads import JobLostError, TurnsJob, fork_server
from lightning_ckptless.ledger import read_ledger

SIZES = ("tiny", "1M", "10M", "33M", "124M", "345M")
RANKS = 2
WARM_UP_STEPS = 2
IDLE_S = 0.3
"""A writer that has been idle for this long (seconds) does not disturb the next segment."""


@dataclass(frozen=True)
class Variant:
    """A training setup.

    Args:
        name: name in the table.
        strategy: `ckptless` or `ddp`.
        every: steps between two states on disk; 0 for none.
    """

    name: str
    strategy: str
    every: int = 0

    def options(self, size: str, batch: int, place: Scratch) -> JobOptions:
        """Return the options of a job with this setup."""
        durable = {"durable_every_n_steps": self.every} if self.every and self.strategy == "ckptless" else {}
        return JobOptions(
            size,
            batch,
            self.strategy,
            durable,
            RANKS,
            turns=True,
            root=str(place.files),
            async_save_every=self.every if self.strategy == "ddp" else 0,
        )


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        every: steps between two states on disk.
        rounds: segments per variant.
        steps: steps of a segment.
        batch: samples per rank and step.
    """

    every: int = 10
    rounds: int = 6
    steps: int = 40
    batch: int = 4

    def variants(self) -> tuple[Variant, ...]:
        """Return the variants to compare."""
        return (
            Variant("ddp", "ddp"),
            Variant("ddp, async_save", "ddp", self.every),
            Variant("ckptless", "ckptless"),
            Variant("ckptless, durable", "ckptless", self.every),
        )


@dataclass
class Measured:
    """Measurements of a variant.

    Args:
        steps_s: times of all steps on the slower rank, by segment.
        writes: times and size of each state on disk.
    """

    steps_s: list[list[float]] = field(default_factory=list)
    writes: list[dict[str, float]] = field(default_factory=list)


def measure(size: str, plan: Plan, place: Scratch, advance: Any) -> dict[str, Any]:
    """Train a model size under each variant, alternating."""
    measured = {variant.name: Measured() for variant in plan.variants()}
    with fork_server(machine.ROOT) as parent, ExitStack() as stack:
        jobs = {
            v.name: stack.enter_context(TurnsJob(v.options(size, plan.batch, place), parent, place))
            for v in plan.variants()
        }
        for job in jobs.values():
            job.train(WARM_UP_STEPS + plan.every)
        for _ in range(plan.rounds):
            for name, job in jobs.items():
                measured[name].steps_s.append(_segment(job, plan.steps))
                _wait_until_idle(job.folder)
                advance()
        for name, job in jobs.items():
            measured[name].writes = _writes(job.folder)
    return {
        "size": size,
        "state_bytes": state_bytes(size),
        "variants": {name: {"steps_s": found.steps_s, "writes": found.writes} for name, found in measured.items()},
    }


def _segment(job: TurnsJob, steps: int) -> list[float]:
    notes = job.train(WARM_UP_STEPS + steps)
    ranks = [note.fields["steps_s"][WARM_UP_STEPS:] for note in notes]
    return [max(step) for step in zip(*ranks, strict=True)]


def _wait_until_idle(folder: Path) -> None:
    """Wait until nothing is being written to disk."""
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < IDLE_S:
        if any(folder.rglob(".step-*.part")) or _is_saving(folder):
            idle_since = time.monotonic()
        time.sleep(0.02)


def _is_saving(folder: Path) -> bool:
    return any(path.is_dir() and not (path / ".metadata").exists() for path in (folder / "saves").glob("step-*"))


def _writes(folder: Path) -> list[dict[str, float]]:
    """Return what the durable writer or the `async_save` callback has recorded of each state."""
    ledgers = folder.glob("*/ledger.jsonl")
    written = [event.fields for path in ledgers for event in read_ledger(path) if event.event == "durable_written"]
    notes = folder / "saves" / NOTES
    saved = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    names = ("copied_s", "blocked_s", "total_s", "bytes", "tries")
    return [{name: float(facts[name]) for name in names if name in facts} for facts in (*written, *saved)]


# ---------------------------------------------------------------------- tables


def step_table(results: dict[str, Any]) -> Table:
    """Return the table of step times."""
    table = Table(
        f"Step time with a state on disk every {results['every']} steps, {RANKS} CPU ranks, alternating",
        ("model", "variant", "step p50 ms", "mean ms", "slowest ms", "mean over the same without saving"),
    )
    table.note("Mean over: median over rounds of the quotient of the mean steps of neighbouring segments.")
    for found in results["sizes"]:
        for name, variant in found["variants"].items():
            steps = [step for segment in variant["steps_s"] for step in segment]
            without = found["variants"][name.partition(",")[0]]["steps_s"]
            over = [_mean(a) / _mean(b) for a, b in zip(variant["steps_s"], without, strict=True)]
            cell = f"{median(over) - 1:+.1%}" if "," in name else ""
            cells = (f"{1e3 * value:.1f}" for value in (median(steps), _mean(steps), max(steps)))
            table.add(found["size"], name, *cells, cell)
    return table


def write_table(results: dict[str, Any]) -> Table:
    """Return the table of the time that a state takes."""
    table = Table(
        "One state, from the moment it is due until it is on disk",
        ("model", "state MB", "variant", "states", "MB on disk", "training waits ms", "copied ms", "on disk after ms"),
    )
    table.note(
        "Training waits: in `async_save`, for the previous save and for the copy of the state. Copied: by the durable "
        "writer, from the arena, during training. Medians."
    )
    for found in results["sizes"]:
        for name, variant in found["variants"].items():
            if not (writes := variant["writes"]):
                continue
            waits = f"{_median_ms(writes, 'blocked_s'):.1f}" if "blocked_s" in writes[0] else "0"
            copied = f"{_median_ms(writes, 'copied_s'):.1f}" if "copied_s" in writes[0] else ""
            on_disk = f"{median([w['bytes'] for w in writes]) / 1e6:.1f}"
            after = f"{_median_ms(writes, 'total_s'):.1f}"
            state = f"{found['state_bytes'] / 1e6:.1f}"
            table.add(found["size"], state, name, len(writes), on_disk, waits, copied, after)
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _median_ms(writes: list[dict[str, float]], name: str) -> float:
    return 1e3 * median([write[name] for write in writes])


def run(plan: Plan, sizes: list[str], progress: Progress) -> dict[str, Any]:
    """Measure all sizes."""
    task = progress.add_task("", total=plan.rounds * len(plan.variants()) * len(sizes))
    results: dict[str, Any] = {"every": plan.every, "sizes": []}
    for size in sizes:
        progress.update(task, description=f"{size}, {len(plan.variants())} variants alternating")
        with scratch() as place:
            try:
                results["sizes"].append(measure(size, plan, place, lambda: progress.advance(task)))
            except JobLostError as error:
                console.print(f"{size}: {error}", markup=False)
    return results


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    args = parser.parse_args()
    report = Report(args)
    torch.set_num_threads(1)
    plan = Plan(every=5, rounds=2, steps=15) if args.quick else Plan()
    with progress_bar() as progress:
        results = run(plan, args.sizes, progress)
    report.finish([step_table(results), write_table(results)], results)


if __name__ == "__main__":
    main()
