"""The ports on which a single-node run listens."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.testing.starters import program_of
from tests.faults.conftest import REPOSITORY

PROGRAM = """
    import json, os, signal, sys
    from pathlib import Path
    import psutil
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    def listening(pid):
        found = psutil.Process(pid).net_connections("tcp")
        return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]

    class Ports(Callback):
        def on_train_batch_start(self, trainer, *_):
            rank, step = trainer.global_rank, trainer.global_step
            if step == 2 and rank == 1 and not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if step in (1, 3):
                found = {"worker": listening(os.getpid()), "agent": listening(int(os.environ["CKPTLESS_AGENT"]))}
                Path(f"step-{step}-rank-{rank}.json").write_text(json.dumps(found))

    Trainer(
        strategy="ckptless", accelerator="cpu", devices=2, max_steps=4, callbacks=[Ports()], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    ).fit(BoringModel())
"""


@pytest.fixture
def config(tmp_path: Path) -> LaunchConfig:
    """Two ranks; the program kills rank 1 at step 2."""
    (program := tmp_path / "program.py").write_text(dedent(PROGRAM))
    env = {"PYTHONPATH": str(REPOSITORY)}
    (arenas := tmp_path / "arenas").mkdir()
    return LaunchConfig(
        program=program_of([str(program)]),
        nproc=2,
        cwd=tmp_path,
        run_root=tmp_path / "runs",
        arena_dir=arenas,
        env=env,
    )


@pytest.mark.slow
def test_a_single_node_run_listens_on_loopback_only(config: LaunchConfig, parent: ForkServer, tmp_path: Path) -> None:
    before = {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp")}
    outcome = run(config, parent=parent)
    assert (outcome.exit_code, outcome.in_place, outcome.restarts) == (0, 1, 0)
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("step-*.json"))]
    assert len(records) == 4
    for record in records:
        agent = {(ip, port) for ip, port in record["agent"]} - before
        assert [ip for ip, _ in agent] == ["127.0.0.1"]
        assert record["worker"] and {ip for ip, _ in record["worker"]} == {"127.0.0.1"}
