"""Staging against a plain memcpy: the shard of one rank into warm shared memory, both in this process, in turns."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt import GPT
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.staging import Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp

Tensors = dict[str, torch.Tensor]


def state_of(size: str) -> Tensors:
    """Parameters and AdamW's state of a model after one step, by name."""
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


def measure_staging(size: str, arenas: Path, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Stage the shard of rank 0 and copy as many bytes by memcpy, alternately.

    Args:
        size: of the model.
        arenas: folder in shared memory.
        ranks: shards that the state is cut into.
        repeats: of each.

    Returns:
        Bytes of the shard, number of its pieces, and the seconds of all repeats: `memcpy_s`, `stage_s` (all late, as
        with `staging="overlap"`), `take_s` (the training thread's part of it).
    """
    tensors = state_of(size)
    layout = plan_layout([describe(tensors, replicated=True)] * ranks)
    shard_bytes = layout.bulk_bytes(0)
    ours = _slot(arenas / f"ours-{size}", layout)
    plain = _slot(arenas / f"plain-{size}", layout)
    source = torch.ones(shard_bytes, dtype=torch.uint8)
    stager = Stager(layout, 0)
    taken_s: list[float] = []

    def stage() -> None:
        began = time.perf_counter()
        load = stager.take(ours.bulk, tensors, ())
        taken_s.append(time.perf_counter() - began)
        stager.finish(load)

    def memcpy() -> None:
        ctypes.memmove(plain.bulk.data_ptr(), source.data_ptr(), shard_bytes)

    try:
        memcpy_s, stage_s = in_turns(memcpy, stage, repeats=repeats)
    finally:
        for slot in (ours, plain):
            slot.close()
            slot.path.unlink()
    return {
        "size": size,
        "shard_bytes": shard_bytes,
        "pieces": len(layout.of(0)),
        "memcpy_s": memcpy_s,
        "stage_s": stage_s,
        "take_s": taken_s[-repeats:],
    }


def measure_frozen(size: str, arenas: Path, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Stage and guard the shard of rank 0 of a model of which nine tenths are frozen: as still, and as all others.

    Args:
        size: of the model.
        arenas: folder in shared memory.
        ranks: shards that the state is cut into.
        repeats: of each.

    Returns:
        Bytes of the shard and of its still part, those written and sent per version, and the seconds of all repeats.
    """
    tensors = frozen_state_of(size)
    described = describe(tensors, replicated=True)
    frozen = {
        name
        for name in tensors
        if name.startswith("parameter/") and f"optimizer/0/{name.partition('/')[2]}/step" not in tensors
    }
    still = _Staged(
        arenas / f"still-{size}",
        plan_layout([tuple(replace(d, still=d.name in frozen) for d in described)] * ranks),
    )
    moving = _Staged(arenas / f"moving-{size}", plan_layout([described] * ranks))
    try:
        still_s, moving_s = in_turns(lambda: still.stage(tensors), lambda: moving.stage(tensors), repeats=repeats)
    finally:
        for staged in (still, moving):
            staged.slot.close()
            staged.slot.path.unlink()
    return {
        "size": size,
        "shard_bytes": still.layout.bulk_bytes(0),
        "still_bytes": still.layout.still_bytes(0),
        "written_bytes": still.layout.bulk_bytes(0) - still.spared_bytes,
        "sent_bytes": still.layout.bulk_bytes(0) - (still.layout.still_bytes(0) if still.is_there else 0),
        "still_s": still_s,
        "moving_s": moving_s,
    }


def frozen_state_of(size: str) -> Tensors:
    """Parameters of a model, and AdamW's state of those of its last blocks that make up a tenth."""
    tensors = state_of(size)
    parameters = {name: t for name, t in tensors.items() if name.startswith("parameter/")}
    total, trained, count = sum(t.numel() for t in parameters.values()), set(), 0
    for name, tensor in sorted(parameters.items(), key=lambda item: item[1].numel()):
        if count + tensor.numel() <= total / 10:
            trained.add(name.partition("/")[2])
            count += tensor.numel()
    return {n: t for n, t in tensors.items() if n in parameters or n.split("/")[2] in trained}


class _Staged:
    """One slot that a shard is staged into again and again."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout, self.slot, self.stager = layout, _slot(path, layout), Stager(layout, 0)
        self.spared_bytes, self.is_there = 0, False

    def stage(self, tensors: Tensors) -> None:
        """Copy what has changed, and compute the digests that guard it, as the mirror does."""
        load = self.stager.take(self.slot.bulk, tensors, ())
        self.spared_bytes = self.stager.finish(load)
        self.is_there = load.static.settle()
        digest("xxh3", [bytes_of(self.slot.bulk[self.layout.still_bytes(0) :])])


def in_turns(first: Callable[[], None], second: Callable[[], None], *, repeats: int) -> tuple[list[float], list[float]]:
    """Time two functions alternately, after two rounds that do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-2, repeats):
        for function, seconds in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            if repeat >= 0:
                seconds.append(time.perf_counter() - began)
    return times


def _slot(path: Path, layout: Layout) -> Slot:
    slot = Slot(path, "benchmark", layout.bulk_bytes(0))
    slot.begin(Stamp(Version(1, True), 1, layout.world_size, layout.digest, 0, 0))
    return slot
