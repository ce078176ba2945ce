"""Two agents on one machine: one is lost together with its workers, and another one replaces it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program
from tests.membership.conftest import REPOSITORY, script, worker_env

# Runs until a file tells it to stop, or fails once with its peer, as a worker in a collective would.
WAITS = """
    import json, os, sys, time
    from pathlib import Path
    name = f"{os.environ['CKPTLESS_NODE']}-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}"
    Path(f"{name}.part").write_text(json.dumps(dict(os.environ)))
    Path(f"{name}.part").rename(f"{name}.json")
    is_survivor = os.environ["CKPTLESS_NODE"] == "first" and "CKPTLESS_FAULT_REPORT" not in os.environ
    while not Path("enough").exists():
        time.sleep(0.005)
        if Path("lost").exists() and is_survivor and "fails" in sys.argv:
            sys.exit(1)
"""

# A busy machine must not take a healthy agent for lost, a test must not wait long.
CONF = {"is_host": "0", "keep_alive_interval": "1", "keep_alive_max_attempt": "3", "last_call_timeout": "1"}


def node_of_two(name: str, program: Program, port: int, folder: Path, **more: Any) -> LaunchConfig:
    """One of two nodes whose rendezvous is at a port of loopback."""
    return LaunchConfig(
        program=program,
        nnodes="2",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_conf=CONF,
        run_id="two",
        node_name=name,
        local_addr="127.0.0.1",
        cwd=folder,
        fresh=True,
        stop_grace_s=1,
        **more,
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("manner", ["fails", "hangs"])
def test_a_new_node_replaces_a_lost_one(
    manner: str, bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = script(write(WAITS), manner)
    spawned: queue.SimpleQueue[str] = queue.SimpleQueue()

    def record(event: str, **fields: Any) -> None:
        if event == "workers_spawned":
            spawned.put(fields["node"])

    def node(name: str) -> LaunchConfig:
        return node_of_two(name, program, store.port, tmp_path)

    options = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-id=two", "--local-addr=127.0.0.1"]
    conf = ",".join(f"{key}={value}" for key, value in CONF.items())
    command = [*options, f"--rdzv-conf={conf}", "--no-preload", program.target, manner]
    lost = subprocess.Popen(
        [sys.executable, "-m", "lightning_ckptless.membership", *command],
        cwd=tmp_path,
        env=worker_env({"PYTHONPATH": str(REPOSITORY)}),
        stdout=subprocess.DEVNULL,
    )
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, node("first"), parent=bare, record=record)
        assert spawned.get(timeout=60) == "first"
        lost.kill()
        lost.wait()
        (tmp_path / "lost").touch()
        second = pool.submit(run, node("second"), parent=bare, record=record)
        assert {spawned.get(timeout=60), spawned.get(timeout=60)} == {"first", "second"}
        (tmp_path / "enough").touch()
        assert (first.result().exit_code, first.result().restarts) == (0, 1)
        assert (second.result().exit_code, second.result().restarts) == (0, 0)
    assert [fault.kind for fault in first.result().faults] == ["lost" if manner == "hangs" else "exited"]
    told = [json.loads(path.read_text()) for path in tmp_path.glob("first-*-of-2.json")]
    reports = [FaultReport.from_json(env[environment.FAULT_REPORT]) for env in told if environment.FAULT_REPORT in env]
    assert [*reports] == [*first.result().faults]


ONE_FAILS = """
    import os, sys, time
    from pathlib import Path
    if os.environ["CKPTLESS_NODE"] == "second":
        sys.exit(3)
    while not Path("enough").exists():
        time.sleep(0.005)
"""


@pytest.mark.slow
def test_a_node_that_ends_for_good_ends_the_others(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    events: list[str] = []

    def node(name: str) -> LaunchConfig:
        return node_of_two(name, script(write(ONE_FAILS)), store.port, tmp_path, max_restarts=0)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, node("first"), parent=bare, record=lambda event, **_: events.append(event))
        second = pool.submit(run, node("second"), parent=bare)
        assert second.result(timeout=60).exit_code == 3
        assert first.result(timeout=60).exit_code == 1
    (fault,) = first.result().faults
    assert fault.detected_at - fault.died_at > 1, "silence is part of the time that it took to see the loss"
    assert "node_lost" in events


ENDS_FIRST = """
    import os, time
    from pathlib import Path
    done = Path("done")
    if os.environ["RANK"] == "0":
        with done.open("a") as file:
            file.write(f"{os.getpid()} ")
    elif "CKPTLESS_FAULT_REPORT" not in os.environ:
        while not done.exists() or Path("/proc", done.read_text().split()[0]).exists():
            time.sleep(0.005)
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_node_whose_workers_have_succeeded_starts_them_again_after_a_fault(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The worker of rank 1 is killed when that of rank 0 has exited."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = script(write(ENDS_FIRST))
    with ThreadPoolExecutor(2) as pool:
        nodes = [
            pool.submit(run, node_of_two(name, program, store.port, tmp_path), parent=bare)
            for name in ("first", "second")
        ]
        outcomes = [node.result() for node in nodes]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert sorted(fault.kind for outcome in outcomes for fault in outcome.faults) == ["killed", "lost"]
    assert len((tmp_path / "done").read_text().split()) == 2
