"""Staging compared with a plain memcpy: one rank's shard into warm shared memory, alternating in this process."""

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


def measure_staging(size: str, arenas: Path, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Stage the shard of rank 0 and copy the same number of bytes by memcpy, alternating.

    Args:
        size: model size.
        arenas: folder in shared memory.
        ranks: number of shards of the state.
        repeats: number of repeats of each.

    Returns:
        Bytes of the shard, number of its pieces, and the seconds of all repeats: `memcpy_s`, `stage_s` (with the
        copies at the end, as with `staging="overlap"`), `take_s` (the training thread's part of it).
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
    """Stage and checksum the shard of rank 0 of a model with nine tenths frozen, with and without static tensors.

    Args:
        size: model size.
        arenas: folder in shared memory.
        ranks: number of shards of the state.
        repeats: number of repeats of each.

    Returns:
        Bytes of the shard and of its static part, those written and sent per version, and the seconds of all repeats.
    """
    tensors = frozen_state_of(size)
    described = describe(tensors, replicated=True)
    frozen = {
        name
        for name in tensors
        if name.startswith("parameter/") and f"optimizer/0/{name.partition('/')[2]}/step" not in tensors
    }
    static = _Staged(
        arenas / f"static-{size}",
        plan_layout([tuple(replace(d, static=d.name in frozen) for d in described)] * ranks),
    )
    plain = _Staged(arenas / f"changing-{size}", plan_layout([described] * ranks))
    try:
        static_s, plain_s = in_turns(lambda: static.stage(tensors), lambda: plain.stage(tensors), repeats=repeats)
    finally:
        for staged in (static, plain):
            staged.slot.close()
            staged.slot.path.unlink()
    return {
        "size": size,
        "shard_bytes": static.layout.bulk_bytes(0),
        "static_bytes": static.layout.static_bytes(0),
        "written_bytes": static.layout.bulk_bytes(0) - static.spared_bytes,
        "sent_bytes": static.layout.bulk_bytes(0) - (static.layout.static_bytes(0) if static.is_there else 0),
        "static_s": static_s,
        "plain_s": plain_s,
    }


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


class _Staged:
    """A slot into which a shard is staged repeatedly."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout, self.slot, self.stager = layout, _slot(path, layout), Stager(layout, 0)
        self.spared_bytes, self.is_there = 0, False

    def stage(self, tensors: Tensors) -> None:
        """Copy what has changed, and compute its digest, as the mirror does."""
        load = self.stager.take(self.slot.bulk, tensors, ())
        self.spared_bytes = self.stager.finish(load)
        self.is_there = load.static.settle()
        digest("xxh3", [bytes_of(self.slot.bulk[self.layout.static_bytes(0) :])])


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


def _slot(path: Path, layout: Layout) -> Slot:
    slot = Slot(path, "benchmark", layout.bulk_bytes(0))
    slot.begin(Stamp(Version(1, True), 1, layout.world_size, layout.digest, 0, 0))
    return slot
