"""A thread stuck in gloo is found, in a real process whose peer reads nothing; a slow thread is not."""

from __future__ import annotations

import ast
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.forkserver.client import Forked, ForkServer
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.membership.worker.stuck_collectives import StuckCollectives, main_thread_waits
from lightning_ckptless.system import futex
from tests.membership.conftest import finish, script, start, worker_env

# Rank 1 is ready to receive, and stops. Rank 0's data fills the pipe; then its connections are aborted.
PAIR = """
    import fcntl, os, select, signal, struct, termios, threading, time
    from dataclasses import asdict
    import torch
    import torch.distributed as dist
    from lightning_ckptless.membership.worker.process_groups import World
    from lightning_ckptless.membership.channel.agent_channel import AgentChannel
    from lightning_ckptless.protocol.messages import Regroup, encode
    from lightning_ckptless.membership.channel.fault_report import FaultReport
    from lightning_ckptless.membership.worker.watcher import ThreadedWatcher

    rank, world = int(os.environ["RANK"]), World()
    world.open(rank=rank, world_size=2, backend="gloo", timeout=None, device=None)
    parcel = torch.zeros(64 << 20, dtype=torch.uint8)
    if rank == 1:
        work = dist.irecv(parcel, 0)
        os.kill(os.getpid(), signal.SIGSTOP)

    def unsent_bytes():
        found = 0
        for number in os.listdir("/proc/self/fd"):
            try:
                answer = fcntl.ioctl(int(number), termios.TIOCOUTQ, bytes(4))
            except OSError:
                continue
            found += struct.unpack("i", answer)[0]
        return found

    def agent(channel):
        while unsent_bytes() < 1 << 18:
            time.sleep(0.001)
        fault = FaultReport(1, 99, None, "SIGKILL", 1.0, 2.0, 3.0, 1, 2)
        channel.send(Regroup(1, asdict(fault), {}))
        if select.select([channel], [], [], 10)[0]:
            print(encode(channel.receive().message), flush=True)
        os._exit(0)

    ours, theirs = AgentChannel.pair()
    watcher = ThreadedWatcher(theirs, world.abort)
    threading.Thread(target=agent, args=[ours], daemon=True).start()
    dist.send(parcel, 1)
"""


@pytest.fixture
def ranks(parent: ForkServer, write: Callable[..., Path], tmp_path: Path) -> Iterator[list[tuple[Forked, Path]]]:
    """Both ranks of the script; the stopped one is killed after the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    program, found = script(write(PAIR)), list[tuple[Forked, Path]]()
    for rank in (0, 1):
        folder = tmp_path / f"rank-{rank}"
        folder.mkdir()
        env = worker_env({**rendezvous, "WORLD_SIZE": "2", "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"})
        found.append((start(parent, Job(program, env, str(folder)), folder), folder))
    yield found
    stopped, folder = found[1]
    parent.signal([stopped.pid], signal.SIGKILL)
    assert finish(parent, stopped, folder).exit_code == -signal.SIGKILL


def test_a_thread_stuck_in_gloo_is_reported(parent: ForkServer, ranks: list[tuple[Forked, Path]]) -> None:
    ran = finish(parent, *ranks[0])
    assert (ran.exit_code, ran.err) == (0, ""), "gloo has woken the thread: stuck_collectives.py is no longer needed"
    assert "MainThread sleeps in torch.distributed.distributed_c10d.send" in ran.out
    said = ast.literal_eval(ran.out)
    assert said["kind"] == "StuckCollective"
    (stuck,) = (line for line in said["threads"] if "MainThread in torch.distributed.distributed_c10d.send:" in line)
    assert "state S" in stuck
    assert any("no Python frame" in line for line in said["threads"]), "gloo's own threads"
    assert any(" -> 127.0.0.1:" in line and "bytes not acknowledged" in line for line in said["sockets"])


def test_a_thread_that_sleeps_elsewhere_is_not_stuck() -> None:
    waits = StuckCollectives()
    assert [waits.poll(0, now) for now in (0.0, 1.0, 2.0)] == [None] * 3


def test_a_vote_in_shared_memory_is_a_wait_and_cannot_be_stuck() -> None:
    """`main_thread_waits` tells an agent that a silent rank waits for others: it must not be blamed for that."""
    word, found, waits = ctypes.c_uint64(), list[str | None](), StuckCollectives()

    def look() -> None:
        while not main_thread_waits():
            pass
        found.extend(waits.poll(0, now) for now in (0.0, 1.0, 2.0))
        word.value = 1
        futex.wake(ctypes.addressof(word))

    thread = threading.Thread(target=look)
    thread.start()
    while not word.value:
        futex.wait(ctypes.addressof(word), 0, 30.0)
    thread.join()
    assert found == [None, None, None]
