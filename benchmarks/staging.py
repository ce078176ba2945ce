"""Staging the shard of one rank into warm shared memory, against a plain memcpy, alternating in this process."""

from __future__ import annotations

import ctypes
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.jobs.gpt import GPT, WIDTHS
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.staging import Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp

SIZES = ("1M", "10M", "33M")
RANKS = (2, 4)
TARGET = 1.25
"""Longest staging, as a multiple of the time of a plain memcpy: four fifths of its speed."""

Tensors = dict[str, torch.Tensor]


@contextmanager
def warm_slot(path: Path, layout: Layout) -> Iterator[Slot]:
    """A slot for the shard of rank 0, which is removed at the end."""
    slot = Slot(path, "benchmark", layout.bulk_bytes(0))
    slot.begin(Stamp(Version(1, True), 1, layout.world_size, layout.digest, 0, 0))
    try:
        yield slot
    finally:
        slot.close()
        path.unlink()


def measure_staging(size: str, arenas: Path, *, ranks: int, repeats: int) -> Results:
    """Stage the shard of rank 0 of `ranks`, and copy the same number of bytes by memcpy, alternating.

    Returns:
        Bytes of the shard, number of its pieces, and the seconds of all repeats: `memcpy_s`, and `stage_s` with the
        copies at the end, as with `staging="overlap"`.
    """
    tensors = state_of(size)
    layout = plan_layout([describe(tensors, replicated=True)] * ranks)
    length, stager = layout.bulk_bytes(0), Stager(layout, 0)
    source = torch.ones(length, dtype=torch.uint8)
    with warm_slot(arenas / f"ours-{size}", layout) as ours, warm_slot(arenas / size, layout) as plain:
        memcpy_s, stage_s = in_turns(
            lambda: ctypes.memmove(plain.bulk.data_ptr(), source.data_ptr(), length),
            lambda: stager.finish(stager.take(ours.bulk, tensors, ())),
            repeats=repeats,
        )
    sizes = {"size": size, "ranks": ranks, "shard_bytes": length, "pieces": len(layout.of(0))}
    return {**sizes, "memcpy_s": memcpy_s, "stage_s": stage_s}


def state_of(size: str) -> Tensors:
    """Return the parameters and the AdamW state of a model after one step, by name."""
    model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter/{name}"] = parameter.detach()
        tensors |= {f"optimizer/0/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def in_turns(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int
) -> tuple[list[float], list[float]]:
    """Time two functions alternately, after two warm-up rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-2, repeats):
        for function, seconds in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            if repeat >= 0:
                seconds.append(time.perf_counter() - began)
    return times


# ---------------------------------------------------------------------- the program


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure every size."""
    torch.set_num_threads(1)
    results["staging"] = []
    steps.expect(len(args.sizes))
    with scratch() as place:
        for size in args.sizes:
            steps.begin(size)
            for ranks in args.ranks:
                results["staging"].append(measure_staging(size, place.arenas, ranks=ranks, repeats=args.repeats))
            steps.done()


def gb_per_s(name: str) -> Callable[[Results], float]:
    return lambda row: float(row["shard_bytes"] / median(row[name]) / 1e9)


def ratio(row: Results) -> float:
    return float(median(row["stage_s"]) / median(row["memcpy_s"]))


def ms(name: str) -> Callable[[Results], float]:
    return lambda row: float(1e3 * median(row[name]))


STAGING = (
    Column("model", "size"),
    Column("ranks", "ranks"),
    Column("MB", lambda row: row["shard_bytes"] / 1e6, ".2f"),
    Column("pieces", "pieces"),
    Column("memcpy ms", ms("memcpy_s"), ".2f"),
    Column("GB/s", gb_per_s("memcpy_s"), ".1f"),
    Column("staging ms", ms("stage_s"), ".2f"),
    Column("GB/s", gb_per_s("stage_s"), ".1f"),
    Column("ratio", ratio, ".2f"),
)


def tables(_: Namespace, results: Results) -> list[Table]:
    rows = results["staging"]
    ratios = [f"{row['size']}, {row['ranks']} ranks: {verdict(ratio(row), TARGET, 'x memcpy')}" for row in rows]
    title = "Staging the shard of one rank, against a plain memcpy into warm shared memory"
    return [Table.of(title, rows, *STAGING, notes=ratios)]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4)")
    add_count(parser, "--repeats", Default(40, 10), "copies of each kind")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
