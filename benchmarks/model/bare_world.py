"""The transport between ranks without a trainer: what its calls take on this machine.

The ranks are forked, so that 64 of them start within seconds. Times are those of the quickest of several calls: this is
what the machine can do, and what a model of it predicts.
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
LARGE_BYTES, SMALL_BYTES = 1 << 20, 64
CALLS, REQUESTS, GROUPS = 40, 50, 5
_BYTES_SENT = 200
"""Offset of `tcpi_bytes_sent` in the kernel's `struct tcp_info`."""

Figures = dict[str, dict[str, float]]
"""By name of the call: wall seconds, and the bytes that a rank sends."""


def measure_bare_world(ranks: int) -> Figures:
    """Start ranks, and time a vote, a gather, exchanges, requests to the store, and the creation of a group.

    Returns:
        The median over the ranks of the wall time, and the mean of the sent bytes.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    found = answers_of(ranks, _work, ranks, store.port, method="fork")
    kinds: dict[str, Callable[[list[float]], float]] = {"wall_s": median, "bytes": mean}
    return {name: {kind: of([each[name][kind] for each in found]) for kind, of in kinds.items()} for name in found[0]}


def _work(rank: int, ranks: int, port: int) -> Figures:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world, groups = GlooTransport(None), list[Any]()
    store.set("key", "value")

    def exchange(count: int) -> Callable[[], Any]:
        sent, received = torch.zeros(count, dtype=torch.uint8), receive_buffer(count)
        after, before = (rank + 1) % ranks, (rank - 1) % ranks
        return lambda: transport.exchange([(after, 0, sent)], [(before, 0, received)])

    group = _timed(world, GROUPS, lambda: groups.append(dist.new_group(backend="gloo")))
    transport = GlooTransport(groups[-1])
    return {
        "group": group,
        "requests": _timed(transport, CALLS, lambda: [store.get("key") for _ in range(REQUESTS)]),
        "vote": _timed(transport, CALLS, lambda: transport.vote(1)),
        "gather": _timed(transport, CALLS, lambda: transport.gather(b"{}")),
        "small exchange": _timed(transport, CALLS, exchange(SMALL_BYTES)),
        "large exchange": _timed(transport, CALLS, exchange(LARGE_BYTES)),
    }


def _timed(transport: GlooTransport, calls: int, call: Callable[[], Any]) -> dict[str, float]:
    transport.vote(1)
    sockets, walls, sent = _sockets(), list[float](), list[int]()
    for _ in range(calls):
        transport.vote(1)  # so that all begin together
        before, began = _sent_bytes(sockets), time.perf_counter()
        call()
        walls.append(time.perf_counter() - began)
        sent.append(_sent_bytes(sockets) - before)
    transport.vote(1)
    return {"wall_s": min(walls), "bytes": mean(sent)}


def _sockets() -> list[int]:
    """Return the connections of this process."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    found.append(number)
        except OSError:  # no socket
            continue
    return found


def _sent_bytes(numbers: list[int]) -> int:
    """Return the bytes that the kernel has sent over connections so far."""
    total = 0
    for number in numbers:
        with socket.socket(fileno=os.dup(number)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("=Q", info, _BYTES_SENT)[0]
    return total
