"""The cost of durable states to training, and the time until one is on disk, compared with torch's `async_save`.

Two ranks of the same job train under each variant. The variants run at the same time and alternate in short segments.
Each writes the same state to the same disk equally often: the durable writer reads the arena while training continues;
`torch.distributed.checkpoint.async_save` copies the state in the training thread and writes it in another thread.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.scenario import events_of
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import Plan, Segment, segment_of, train_in_turns
from benchmarks.harness.variants import Variant
from benchmarks.harness.watch import NoRecoveryError, Watch
from benchmarks.jobs.async_save import saves_of
from benchmarks.jobs.gpt import WIDTHS, state_bytes
from benchmarks.jobs.job import JobOptions

SIZES = ("tiny", "1M", "10M", "33M", "124M", "345M")
RANKS, BATCH = 2, 4
IDLE_S = 0.3
"""A writer that has been idle for this long (seconds) does not disturb the next segment."""


def variants(size: str, every: int) -> dict[str, JobOptions]:
    """Return the compared jobs; two of them write a state every `every` steps."""
    ddp = JobOptions(size, BATCH, devices=RANKS)
    ours = ddp.but(strategy="ckptless")
    return {
        "ddp": ddp,
        "ddp, async_save": ddp.but(async_save_every=every),
        "ckptless": ours,
        "ckptless, durable": ours.but(strategy_options={"durable_every_n_steps": every}),
    }


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every size under each variant, alternating."""
    results |= {"every": 5 if args.quick else 10, "sizes": []}
    count = 15 if args.quick else 40
    steps.expect(args.rounds * 4 * len(args.sizes))
    for size in args.sizes:
        steps.begin(f"{size}, 4 variants alternating")
        with scratch() as place:
            jobs, plan = variants(size, results["every"]), Plan(args.rounds, (count, count))
            try:
                segments = train_in_turns(jobs, place, plan, steps.done, written_segment)
            except NoRecoveryError as error:
                console.print(f"{size}: {error}", markup=False)
            else:
                results["sizes"].append({"size": size, "segments": segments})


def written_segment(watch: Watch, folder: Path, steps: int) -> Segment:
    """Let a job train, wait until nothing is being written, and add the records of all states so far."""
    segment, idle_since = segment_of(watch, folder, steps), time.monotonic()
    while time.monotonic() - idle_since < IDLE_S:
        if any(folder.rglob(".step-*.part")) or is_saving(folder):
            idle_since = time.monotonic()
        time.sleep(0.02)
    return {**segment, "writes": [*events_of(folder, "durable_written"), *saves_of(folder)]}


def is_saving(folder: Path) -> bool:
    """Return whether `async_save` is writing."""
    return any(path.is_dir() and not (path / ".metadata").exists() for path in (folder / "saves").glob("step-*"))


def measured(results: Results) -> list[Variant]:
    """Return all variants, each compared with the same strategy without saving."""
    return [
        Variant(found["size"], BATCH, name, segments, found["segments"][name.partition(",")[0]])
        for found in results["sizes"]
        for name, segments in found["segments"].items()
    ]


def writes_of(variant: Variant) -> list[Results]:
    return variant.segments[-1]["writes"]  # type: ignore[no-any-return]


def write_ms(name: str) -> Callable[[Variant], list[float]]:
    return lambda variant: [1e3 * write[name] for write in writes_of(variant) if name in write]


MODEL, VARIANT = Column("model", lambda v: v.size), Column("variant", lambda v: v.name)
STEP = (
    MODEL,
    VARIANT,
    Column("step p50 ms", lambda v: v.steps_ms(), ".1f", median),
    Column("mean ms", lambda v: v.steps_ms(), ".1f", fmean),
    Column("slowest ms", lambda v: v.steps_ms(), ".1f", max),
    Column("mean over the same without saving", lambda v: v.over_mean(), "+.1%", median),
)
WRITE = (
    MODEL,
    Column("state MB", lambda v: state_bytes(v.size) / 1e6, ".1f"),
    VARIANT,
    Column("states", lambda v: len(writes_of(v))),
    Column("MB on disk", lambda v: [write["bytes"] / 1e6 for write in writes_of(v)], ".1f", median),
    Column("training waits ms", lambda v: write_ms("blocked_s")(v) or [0.0], ".1f", median),
    Column("copied ms", write_ms("copied_s"), ".1f", median),
    Column("on disk after ms", write_ms("total_s"), ".1f", median),
)
STEP_NOTE = "Mean over: median over rounds of the quotient of the mean steps of neighbouring segments."
WRITE_NOTE = (
    "Training waits: in `async_save`, for the previous save and for the copy of the state. Copied: by the durable "
    "writer, from the arena, during training. Medians."
)


def tables(_: Namespace, results: Results) -> list[Table]:
    found, state = measured(results), "One state, from the moment it is due until it is on disk"
    step = f"Step time with a state on disk every {results['every']} steps, {RANKS} CPU ranks, alternating"
    return [
        Table.of(step, found, *STEP, notes=[STEP_NOTE]),
        Table.of(state, [variant for variant in found if writes_of(variant)], *WRITE, notes=[WRITE_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    add_count(parser, "--rounds", Default(6, 2), "segments per variant")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
