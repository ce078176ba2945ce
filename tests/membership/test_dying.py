"""What is known about a worker between its death and its exit, which comes once its memory is freed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.worker.startup import Job
from tests.membership.conftest import script, worker_env

HEAVY = """
    import mmap, os
    heap = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, 1 << 30, 4096):
        heap[page] = 1
    print("filled", flush=True)
    input()
    {then}
"""


@pytest.mark.parametrize(
    ("then", "exit_code"),
    [("os.kill(os.getpid(), 9)", -signal.SIGKILL), ("os.abort()", -signal.SIGABRT), ("os._exit(3)", 3)],
    ids=["killed", "aborts", "exits"],
)
def test_a_worker_with_much_memory_reveals_its_cause_of_death_at_once(
    then: str, exit_code: int, bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    job = Job(script(write(HEAVY.format(then=then))), worker_env(), str(tmp_path))
    go, goes = os.pipe()
    said, says = os.pipe()
    process = Process.start(bare, job, (go, says, 2))
    os.close(go)
    os.close(says)
    with os.fdopen(said) as lines, os.fdopen(goes, "w") as begin:
        assert lines.readline() == "filled\n"
        assert process.exit_code() is None
        begin.write("\n")
    while not process.is_dying():
        pass
    told = process.exit_code()
    assert not process.has_ended()
    assert told == exit_code == process.end().exit_code
    process.channel.close()
