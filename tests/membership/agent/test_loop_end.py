"""Agents let their workers leave the training loop once those of all nodes are done; the workers are scripted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.launch import run
from tests.membership.conftest import REPOSITORY, script, worker_env
from tests.membership.test_two_nodes import CONF, node_of_two

# The first node's worker has made its last step, the second one's never will, and the third one joins too late.
WORKER = """
    import json, os, time
    from pathlib import Path
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.protocol.messages import AskToLeave, EnteredLoop, LeftLoop, WaitingAtLoop

    node, channel = os.environ["CKPTLESS_NODE"], open_channel()
    options = {"standbys": 0, "preload_imports": False, "hang_timeout_s": None, "obstacle": None, "fixed_world": ""}
    options |= {"straggler_factor": 1.5, "drain_stragglers_after_s": None}
    options |= {"max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    channel.send(EnteredLoop(in_place=True, **options))
    channel.send(WaitingAtLoop())
    if node != "first":
        Path("came-second").touch()
        time.sleep(600)
    while not Path("came-second").exists():
        time.sleep(0.005)
    channel.send(AskToLeave(0, 12, "ran out of training data"))
    Path("ended").touch()
    received = []
    while received[-1:] != ["MayLeave"]:
        received.append(type(channel.receive().message).__name__)
    channel.send(LeftLoop())
    Path("received.json").write_text(json.dumps(received))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_node_lost_before_its_last_step_does_not_block_the_others(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = script(write(WORKER))
    conf = ",".join(f"{key}={value}" for key, value in CONF.items())
    options = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-id=two", "--local-addr=127.0.0.2"]
    second = subprocess.Popen(
        [sys.executable, "-m", "lightning_ckptless.membership", *options, f"--rdzv-conf={conf}", "--no-preload",
         program.target],
        cwd=tmp_path,
        env=worker_env({"PYTHONPATH": str(REPOSITORY)}),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, node_of_two("first", program, store.port, tmp_path), parent=bare)
        while not (tmp_path / "ended").exists():
            assert not first.done(), first.result()
        second.kill()
        second.wait()
        third = pool.submit(run, node_of_two("third", program, store.port, tmp_path), parent=bare)
        assert first.result(timeout=60).exit_code == third.result(timeout=60).exit_code == 0
    assert json.loads((tmp_path / "received.json").read_text()) == ["AwaitRegroup", "MayLeave"], (
        "the worker left before its peers"
    )
