"""The cost of durable states to training, and the time until one is on disk, compared with torch's `async_save`.

Two ranks of the same job train under each variant. The variants run at the same time and alternate in short segments.
Each writes the same state to the same disk equally often: the durable writer reads the arena while training continues;
`torch.distributed.checkpoint.async_save` copies the state in the training thread and writes it in another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.processes import scratch
from benchmarks.harness.scenario import events_of
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import Plan, Segment, Variant, segment_of, slowest_ms, train_in_turns
from benchmarks.harness.watch import Watch
from benchmarks.jobs.async_save import saves_of
from benchmarks.jobs.gpt import WIDTHS, state_bytes
from benchmarks.jobs.job import JobOptions

RANKS, BATCH, EVERY, STEPS = 2, 4, 10, 40
IDLE_S = 0.3
"""A writer that has been idle for this long (seconds) does not disturb the next segment."""


def variants(size: str) -> dict[str, JobOptions]:
    """Return the compared jobs; two of them write a state every few steps."""
    ddp = JobOptions(size, BATCH, devices=RANKS)
    ours = ddp.but(strategy="ckptless")
    return {
        "ddp": ddp,
        "ddp, async_save": ddp.but(async_save_every=EVERY),
        "ckptless": ours,
        "ckptless, durable": ours.but(strategy_options={"durable_every_n_steps": EVERY}),
    }


def written_segment(watch: Watch, folder: Path, steps: int) -> Segment:
    """Let a job train, wait until nothing is being written, and add the records of all states so far."""
    segment, idle_since = segment_of(watch, folder, steps), time.monotonic()
    while time.monotonic() - idle_since < IDLE_S:
        saves = (folder / "saves").glob("step-*")
        if any(folder.rglob(".step-*.part")) or any(not (save / ".metadata").exists() for save in saves):
            idle_since = time.monotonic()
        time.sleep(0.02)
    return {**segment, "writes": [*events_of(folder, "durable_written"), *saves_of(folder)]}


def measured(results: Results) -> list[Variant]:
    """Return all variants, each compared with the same strategy without saving."""
    return [
        Variant(size, BATCH, name, segments, found[name.partition(",")[0]])
        for size, found in results["sizes"].items()
        for name, segments in found.items()
    ]


def steps_ms(variant: Variant) -> list[float]:
    """Return all steps in ms, each on the slowest rank."""
    return [step for segment in variant.segments for step in slowest_ms(segment)]


def mean_ms(segment: Segment) -> float:
    return fmean(slowest_ms(segment))


def writes_of(variant: Variant) -> list[dict[str, float]]:
    return variant.segments[-1]["writes"]  # type: ignore[no-any-return]


def write_ms(name: str) -> Callable[[Variant], list[float]]:
    return lambda variant: [1e3 * write[name] for write in writes_of(variant) if name in write]


MODEL, VARIANT = Column("model", lambda v: v.size), Column("variant", lambda v: v.name)
STEP = (
    MODEL,
    VARIANT,
    Column("step p50 ms", steps_ms, ".1f", median),
    Column("mean ms", steps_ms, ".1f", fmean),
    Column("slowest ms", steps_ms, ".1f", max),
    Column("mean over the same without saving", lambda v: v.over(mean_ms, relative=True), "+.1%", median),
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


@dataclass
class Durable(Benchmark):
    sizes: tuple[str, ...] = option(("tiny", "1M", "10M", "33M"), "model sizes", quick=("tiny",), choices=tuple(WIDTHS))
    rounds: int = option(6, "segments per variant", quick=1)

    def measure(self, results: Results, steps: Steps) -> None:
        results["sizes"], plan = {}, Plan(self.rounds, (STEPS, STEPS))
        steps.expect(self.rounds * 4 * len(self.sizes))
        for size in self.sizes:
            steps.begin(f"{size}, 4 variants alternating")
            with scratch() as place:
                results["sizes"][size] = train_in_turns(variants(size), place, plan, steps.done, written_segment)

    def tables(self, results: Results) -> list[Table]:
        found, state = measured(results), "One state, from the moment it is due until it is on disk"
        step = f"Step time with a state on disk every {EVERY} steps, {RANKS} CPU ranks, alternating"
        return [
            Table.of(step, found, *STEP, notes=[STEP_NOTE]),
            Table.of(state, [variant for variant in found if writes_of(variant)], *WRITE, notes=[WRITE_NOTE]),
        ]


if __name__ == "__main__":
    Durable.main()
