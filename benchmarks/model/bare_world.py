"""The transport between ranks without a trainer: what its calls take on this machine.

The ranks are forked, so that 64 of them start within seconds. Wall and CPU times are those of the quickest of several
calls: this is what the machine can do, and what a model of it predicts.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.world import answers_of
from lightning_ckptless.replica.transport import GlooTransport, receive_buffer

HOST = "127.0.0.1"
LARGE_BYTES = 1 << 20
SMALL_BYTES = 64
CALLS = 40
REQUESTS = 50
GROUPS = 5
_BYTES_SENT = 200
"""Offset of `tcpi_bytes_sent` in the kernel's `struct tcp_info`."""

Figures = dict[str, dict[str, float]]
"""By name of the call: wall and CPU seconds, and the bytes that a rank sends."""


def measure_bare_world(ranks: int) -> Figures:
    """Start ranks, and time a vote, a gather, exchanges, requests to the store, and the creation of a group.

    Returns:
        The median over the ranks of the wall time, and means of CPU time and sent bytes.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    found = answers_of(ranks, _work, ranks, store.port, method="fork")
    kinds: dict[str, Callable[[list[float]], float]] = {"wall_s": median, "cpu_s": mean, "bytes": mean}
    return {name: {kind: of([each[name][kind] for each in found]) for kind, of in kinds.items()} for name in found[0]}


def _work(rank: int, ranks: int, port: int) -> Figures:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    GlooTransport(None).vote(1)
    figures, group = _creation()
    transport = GlooTransport(group)
    store.set("key", "value")
    requests = {"requests": _timed(transport, lambda: [store.get("key") for _ in range(REQUESTS)])}
    return {"group": figures, **requests, **_calls(transport)}


def _creation() -> tuple[dict[str, float], dist.ProcessGroup]:
    """Create several groups; returns the figures of the quickest and the last group."""
    walls, cpus, sent = list[float](), list[float](), list[int]()
    group: dist.ProcessGroup | int | None = None
    for _ in range(GROUPS):
        sockets, began, cpu = _sockets(), time.perf_counter(), time.process_time()
        before = _sent_bytes(sockets)
        group = dist.new_group(backend="gloo")
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
        sent.append(_sent_bytes(sockets) - before)
        GlooTransport(None).vote(1)
    assert isinstance(group, dist.ProcessGroup)
    return {"wall_s": min(walls), "cpu_s": median(cpus), "bytes": median(sent)}, group


def _calls(transport: GlooTransport) -> Figures:
    rank, ranks = transport.rank, transport.world_size
    after, before = (rank + 1) % ranks, (rank - 1) % ranks

    def exchange(count: int) -> Callable[[], Any]:
        sent, received = torch.zeros(count, dtype=torch.uint8), receive_buffer(count)
        return lambda: transport.exchange([(after, 0, sent)], [(before, 0, received)])

    return {
        "vote": _timed(transport, lambda: transport.vote(1)),
        "gather": _timed(transport, lambda: transport.gather(b"{}")),
        "small exchange": _timed(transport, exchange(SMALL_BYTES)),
        "large exchange": _timed(transport, exchange(LARGE_BYTES)),
    }


def _timed(transport: GlooTransport, call: Callable[[], Any]) -> dict[str, float]:
    sockets, walls, cpus, sent = _sockets(), list[float](), list[float](), list[int]()
    for _ in range(CALLS):
        transport.vote(1)  # so that all begin together
        before, cpu, began = _sent_bytes(sockets), time.process_time(), time.perf_counter()
        call()
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
        sent.append(_sent_bytes(sockets) - before)
    transport.vote(1)
    return {"wall_s": min(walls), "cpu_s": min(cpus), "bytes": mean(sent)}


def _sockets() -> list[int]:
    names = os.listdir("/proc/self/fd")
    return [int(name) for name in names if _target(name).startswith("socket:")]


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def _sent_bytes(numbers: list[int]) -> int:
    """Return the bytes that the kernel has sent over connections so far."""
    total = 0
    for number in numbers:
        with socket.socket(fileno=os.dup(number)) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("=Q", info, _BYTES_SENT)[0]
    return total
