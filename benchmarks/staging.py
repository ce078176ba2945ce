"""Staging in this process: the shard of one rank into warm shared memory, and what it is compared with, alternating.

The shard of a whole state is compared with a plain memcpy of as many bytes. A version of a model with nine tenths
frozen, staged and checksummed, is compared with the same tensors in a layout that treats none of them as static.
"""

from __future__ import annotations

import ctypes
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.jobs.gpt import GPT, WIDTHS
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.staging import PendingCopy, Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp

SIZES = ("1M", "10M", "33M")
RANKS = (2, 4)
TARGET = 1.25
"""Longest staging, as a multiple of the time of a plain memcpy: four fifths of its speed."""

Tensors = dict[str, torch.Tensor]


class Shard:
    """A slot in warm shared memory, into which the shard of rank 0 is staged repeatedly; removed when closed."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout, self.stager = layout, Stager(layout, 0)
        self.size_bytes, self.static_bytes = layout.bulk_bytes(0), layout.static_bytes(0)
        self.slot = Slot(path, "benchmark", self.size_bytes)
        self.slot.begin(Stamp(Version(1, True), 1, layout.world_size, layout.digest, 0, 0))
        self.spared_bytes, self.is_static_part_there = 0, False

    def stage(self, tensors: Tensors) -> PendingCopy:
        """Copy what has changed."""
        load = self.stager.take(self.slot.bulk, tensors, ())
        self.spared_bytes = self.stager.finish(load)
        return load

    def stage_and_digest(self, tensors: Tensors) -> None:
        """Copy what has changed, and compute its digest, as the mirror does."""
        static = self.stage(tensors).static
        before = static.digest
        static.settle()
        self.is_static_part_there = bool(before) and static.digest == before
        digest("xxh3", [bytes_of(self.slot.bulk[self.static_bytes :])])

    def close(self) -> None:
        self.slot.close()
        self.slot.path.unlink()


def measure_staging(size: str, arenas: Path, *, ranks: int, repeats: int) -> Results:
    """Stage the shard of rank 0 of `ranks`, and copy the same number of bytes by memcpy, alternating.

    Returns:
        Bytes of the shard, number of its pieces, and the seconds of all repeats: `memcpy_s`, and `stage_s` with the
        copies at the end, as with `staging="overlap"`.
    """
    tensors = state_of(size)
    layout = plan_layout([describe(tensors, replicated=True)] * ranks)
    source = torch.ones(layout.bulk_bytes(0), dtype=torch.uint8)
    with closing(Shard(arenas / f"ours-{size}", layout)) as ours, closing(Shard(arenas / size, layout)) as plain:
        memcpy_s, stage_s = in_turns(
            lambda: ctypes.memmove(plain.slot.bulk.data_ptr(), source.data_ptr(), plain.size_bytes),
            lambda: ours.stage(tensors),
            repeats=repeats,
        )
    sizes = {"size": size, "ranks": ranks, "shard_bytes": ours.size_bytes, "pieces": len(layout.of(0))}
    return {**sizes, "memcpy_s": memcpy_s, "stage_s": stage_s}


def measure_frozen(size: str, arenas: Path, *, ranks: int, repeats: int) -> Results:
    """Stage and checksum the shard of rank 0 of a model with nine tenths frozen, with and without static tensors.

    Returns:
        Bytes of the shard and of its static part, those written and sent per version, and the seconds of all repeats.
    """
    tensors, frozen = frozen_state_of(size)
    described = describe(tensors, replicated=True)
    static = tuple(replace(spec, static=spec.name in frozen) for spec in described)
    ours = Shard(arenas / f"static-{size}", plan_layout([static] * ranks))
    plain = Shard(arenas / f"changing-{size}", plan_layout([described] * ranks))
    with closing(ours), closing(plain):
        static_s, plain_s = in_turns(
            lambda: ours.stage_and_digest(tensors), lambda: plain.stage_and_digest(tensors), repeats=repeats
        )
    return {
        "size": size,
        "shard_bytes": ours.size_bytes,
        "static_bytes": ours.static_bytes,
        "written_bytes": ours.size_bytes - ours.spared_bytes,
        "sent_bytes": ours.size_bytes - (ours.static_bytes if ours.is_static_part_there else 0),
        "static_s": static_s,
        "plain_s": plain_s,
    }


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


def frozen_state_of(size: str) -> tuple[Tensors, set[str]]:
    """Return the parameters of a model with the AdamW state of the smallest tenth, and the names of the frozen ones."""
    tensors = state_of(size)
    parameters = {name: tensor for name, tensor in tensors.items() if name.startswith("parameter/")}
    left, trained = sum(tensor.numel() for tensor in parameters.values()) / 10, set[str]()
    for name, tensor in sorted(parameters.items(), key=lambda item: item[1].numel()):
        if (left := left - tensor.numel()) < 0:
            break
        trained.add(name)
    kept = {n: t for n, t in tensors.items() if n in parameters or f"parameter/{n.split('/')[2]}" in trained}
    return kept, set(parameters) - trained


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
    results |= {"staging": [], "frozen": []}
    steps.expect(len(args.sizes))
    with scratch() as place:
        for size in args.sizes:
            steps.begin(size)
            for ranks in args.ranks:
                results["staging"].append(measure_staging(size, place.arenas, ranks=ranks, repeats=args.repeats))
            results["frozen"].append(measure_frozen(size, place.arenas, ranks=2, repeats=args.repeats))
            steps.done()


def gb_per_s(name: str) -> Callable[[Results], float]:
    return lambda row: float(row["shard_bytes"] / median(row[name]) / 1e9)


def ratio(row: Results) -> float:
    return float(median(row["stage_s"]) / median(row["memcpy_s"]))


def megabytes(name: str) -> Callable[[Results], float]:
    return lambda row: float(row[name] / 1e6)


def ms(name: str) -> Callable[[Results], float]:
    return lambda row: float(1e3 * median(row[name]))


STAGING = (
    Column("model", "size"),
    Column("ranks", "ranks"),
    Column("MB", megabytes("shard_bytes"), ".2f"),
    Column("pieces", "pieces"),
    Column("memcpy ms", ms("memcpy_s"), ".2f"),
    Column("GB/s", gb_per_s("memcpy_s"), ".1f"),
    Column("staging ms", ms("stage_s"), ".2f"),
    Column("GB/s", gb_per_s("stage_s"), ".1f"),
    Column("ratio", ratio, ".2f"),
)
FROZEN = (
    Column("model", "size"),
    Column("MB", megabytes("shard_bytes"), ".1f"),
    Column("static MB", megabytes("static_bytes"), ".1f"),
    Column("written MB", megabytes("written_bytes"), ".1f"),
    Column("sent to a holder MB", megabytes("sent_bytes"), ".1f"),
    Column("stage and checksum ms", ms("static_s"), ".1f"),
    Column("without ms", ms("plain_s"), ".1f"),
    Column("ratio", lambda row: median(row["static_s"]) / median(row["plain_s"]), ".0%"),
)
FROZEN_NOTE = "Without: the same tensors in a layout that treats none of them as static."


def tables(_: Namespace, results: Results) -> list[Table]:
    staging, frozen = results["staging"], results["frozen"]
    ratios = [f"{row['size']}, {row['ranks']} ranks: {verdict(ratio(row), TARGET, 'x memcpy')}" for row in staging]
    plain = "Staging the shard of one rank, against a plain memcpy into warm shared memory"
    tenth = "Nine tenths of the parameters frozen: a version of the shard of one rank of two"
    return [
        Table.of(plain, staging, *STAGING, notes=ratios),
        Table.of(tenth, frozen, *FROZEN, notes=[FROZEN_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4)")
    add_count(parser, "--repeats", Default(40, 10), "copies of each kind")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
