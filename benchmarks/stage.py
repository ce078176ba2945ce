"""Staging against a plain memcpy: the shard of one rank into warm shared memory, both in this process, in turns."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt import GPT
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.description import describe
from lightning_ckptless.replica.layout import Layout
from lightning_ckptless.replica.partition import plan_layout
from lightning_ckptless.replica.slot import Slot, Stamp
from lightning_ckptless.replica.staging import Stager

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
