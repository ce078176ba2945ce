"""Staging in this process: one rank's shard into warm shared memory, alternating with what it is compared with."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.table import verdict
from benchmarks.jobs.gpt import GPT
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.staging import PendingCopy, Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp

TARGET = 1.25
"""Longest staging, as a multiple of the time of a plain memcpy: four fifths of its speed."""

Tensors = dict[str, torch.Tensor]


class _Shard:
    """A slot in warm shared memory, into which the shard of rank 0 is staged repeatedly; removed when closed."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout, self.stager = layout, Stager(layout, 0)
        self.size_bytes, self.static_bytes = layout.bulk_bytes(0), layout.static_bytes(0)
        self.slot = Slot(path, "benchmark", self.size_bytes)
        self.slot.begin(Stamp(Version(1, True), 1, layout.world_size, layout.digest, 0, 0))
        self.take_s: list[float] = []
        self.spared_bytes, self.is_static_part_there = 0, False

    def stage(self, tensors: Tensors) -> PendingCopy:
        """Copy what has changed; `take_s` receives the training thread's part of the time."""
        began = time.perf_counter()
        load = self.stager.take(self.slot.bulk, tensors, ())
        self.take_s.append(time.perf_counter() - began)
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


def measure_staging(size: str, arenas: Path, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Stage the shard of rank 0 of `ranks`, and copy the same number of bytes by memcpy, alternating.

    Returns:
        Bytes of the shard, number of its pieces, and the seconds of all repeats: `memcpy_s`, `stage_s` (with the
        copies at the end, as with `staging="overlap"`), `take_s` (the training thread's part of it).
    """
    tensors = state_of(size)
    layout = plan_layout([describe(tensors, replicated=True)] * ranks)
    source = torch.ones(layout.bulk_bytes(0), dtype=torch.uint8)
    with closing(_Shard(arenas / f"ours-{size}", layout)) as ours, closing(_Shard(arenas / size, layout)) as plain:

        def memcpy() -> None:
            ctypes.memmove(plain.slot.bulk.data_ptr(), source.data_ptr(), plain.size_bytes)

        def stage() -> None:
            ours.stage(tensors)

        memcpy_s, stage_s = in_turns(memcpy, stage, repeats=repeats)
    sizes = {"size": size, "shard_bytes": ours.size_bytes, "pieces": len(layout.of(0))}
    return {**sizes, "memcpy_s": memcpy_s, "stage_s": stage_s, "take_s": ours.take_s[-repeats:]}


def gb_per_s(row: dict[str, Any], name: str) -> float:
    return float(row["shard_bytes"] / median(row[name]) / 1e9)


def ratio_to_memcpy(row: dict[str, Any]) -> float:
    return float(median(row["stage_s"]) / median(row["memcpy_s"]))


def verdict_on(row: dict[str, Any]) -> str:
    """Compare the ratio with its target, in words."""
    return verdict(ratio_to_memcpy(row), TARGET, "x memcpy")


def measure_frozen(size: str, arenas: Path, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Stage and checksum the shard of rank 0 of a model with nine tenths frozen, with and without static tensors.

    Returns:
        Bytes of the shard and of its static part, those written and sent per version, and the seconds of all repeats.
    """
    tensors = frozen_state_of(size)
    described = describe(tensors, replicated=True)
    trained = {name.split("/")[2] for name in tensors if name.startswith("optimizer/")}
    frozen = {n for n in tensors if n.startswith("parameter/") and n.partition("/")[2] not in trained}
    static = tuple(replace(spec, static=spec.name in frozen) for spec in described)
    ours = _Shard(arenas / f"static-{size}", plan_layout([static] * ranks))
    plain = _Shard(arenas / f"changing-{size}", plan_layout([described] * ranks))
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


def frozen_state_of(size: str) -> Tensors:
    """Return the parameters of a model, and the AdamW state of the smallest ones that make up a tenth."""
    tensors = state_of(size)
    parameters = {name: t for name, t in tensors.items() if name.startswith("parameter/")}
    total, trained, count = sum(t.numel() for t in parameters.values()), set(), 0
    for name, tensor in sorted(parameters.items(), key=lambda item: item[1].numel()):
        if count + tensor.numel() <= total / 10:
            trained.add(name.partition("/")[2])
            count += tensor.numel()
    return {n: t for n, t in tensors.items() if n in parameters or n.split("/")[2] in trained}


def in_turns(first: Callable[[], None], second: Callable[[], None], *, repeats: int) -> tuple[list[float], list[float]]:
    """Time two functions alternately, after two warm-up rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-2, repeats):
        for function, seconds in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            if repeat >= 0:
                seconds.append(time.perf_counter() - began)
    return times
