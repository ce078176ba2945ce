"""What each kind of fault does to a process, tested on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lightning_ckptless import environment
from lightning_ckptless.protocol.fault_script import parse_faults
from lightning_ckptless.testing.fault_injector import EXIT_CODE, InjectedError, inject

CODE = """
import sys
from lightning_ckptless.testing.fault_injector import inject
from lightning_ckptless.protocol.fault_script import parse_faults
print("begun", flush=True)
inject(parse_faults(sys.argv[1])[0], 7)
print("not reached", flush=True)
"""


def start(fault: str, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CODE, fault]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **env})


@pytest.mark.parametrize(("kind", "code"), [("kill", -signal.SIGKILL), ("exit", EXIT_CODE)])
def test_kill_and_exit_end_the_process(kind: str, code: int) -> None:
    with start(f"{kind}:rank=0:step=7") as process:
        out, _ = process.communicate(timeout=60)
    assert out == b"begun\n"
    assert process.returncode == code


def test_hang_blocks_the_process() -> None:
    with start("hang:rank=0:step=7") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM


def test_a_node_fault_kills_agent_and_process() -> None:
    with (
        subprocess.Popen(["sleep", "600"]) as agent,
        start("node:rank=0:step=7", **{environment.AGENT: str(agent.pid)}) as process,
    ):
        assert agent.wait(60) == -signal.SIGKILL
        assert process.wait(60) == -signal.SIGKILL


def test_raise_raises_an_error() -> None:
    (fault,) = parse_faults("raise:rank=0:step=7:at=backward")
    with pytest.raises(InjectedError, match="injected at step 7: raise:rank=0:step=7:at=backward"):
        inject(fault, 7)
