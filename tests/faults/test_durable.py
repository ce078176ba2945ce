"""Durable restore: everything is lost, including shared memory, and the run resumes from a durable state."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader as dcp

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.launch.config import new_run_id
from lightning_ckptless.protocol.durable_schedule import state_name
from lightning_ckptless.replica.arena import default_arena_dir, find_arenas
from lightning_ckptless.testing.drill import Variant
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE
from tests.faults.test_restart import Run, assert_identical, job, undisturbed
from tests.lab.parts import Options

__all__ = ["job", "undisturbed"]
SHORT = replace(BASE, epochs=1)


def durable(options: Options = BASE, *, slow_s: float = 0.0, **more: object) -> Options:
    """Return options with durable states; `slow_s` slows mirroring down, so that several states are written."""
    return replace(options, slow_mirror_s=slow_s, strategy_options=repr({"durable_every_n_steps": 2, **more}))


def remove_arenas(run_id: str) -> None:
    for info in find_arenas(default_arena_dir(), run_id):
        shutil.rmtree(info.path)


def states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def durable_folder_of(job: Run) -> Path:
    return job.folder / "runs" / job.run_id / "durable"


def reason_of_last_start(job: Run) -> str:
    return str(job.events("run_started")[-1].fields["reason"])


def flip_bit(path: Path) -> None:
    """Flip a bit near the start of a file, in the host state of a rank."""
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_the_newer_of_arena_and_durable_state_is_restored(job: Run, undisturbed: Callable[[Options], Variant]) -> None:
    job.start(durable(), "kill:rank=1:step=3")
    stale, arena = job.folder / "stale", job.arena.path
    shutil.copytree(arena, stale)
    assert job.start(durable(), "kill:rank=1:step=9").exit_code == 128 + 9
    # The arena has the version of the last durable state or a newer one, and is faster.
    assert "is complete" in reason_of_last_start(job)
    # As if the node had been away while another one continued from the durable states.
    shutil.rmtree(arena)
    shutil.move(stale, arena)
    assert job.start(durable()).exit_code == 0
    assert re.search(r"newest state left, newer than step [12]", reason_of_last_start(job))
    assert_identical(job, undisturbed(BASE))


def test_a_durable_state_of_a_different_model_is_refused(job: Run) -> None:
    job.start(durable(), "kill:rank=1:step=5")
    remove_arenas(job.run_id)
    outcome = job.start(durable(replace(BASE, optimization="two")), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "LayoutMismatchError" in job.output
    assert "optimizer/" in job.output


def test_a_durable_dir_with_other_files_is_refused(job: Run) -> None:
    (job.folder / "theirs").mkdir()
    (job.folder / "theirs" / "thesis.tex").write_text("")
    outcome = job.start(durable(durable_dir="theirs"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "OptionsError" in job.output and "thesis.tex" in job.output


def test_training_continues_if_no_state_can_be_written(job: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.start(durable(SHORT, slow_s=0.15, durable_dir="/proc/nowhere")).exit_code == 0
    failed = job.events("durable_failed")
    assert len(failed) >= 2
    assert "FileNotFoundError" in failed[0].fields["cause"]
    assert capfd.readouterr().err.count("writing the durable state of") == 1


def test_options_set_folder_number_and_interval_of_states(job: Run) -> None:
    options: dict[str, Any] = {"durable_keep": 1, "durable_every_n_steps": 3, "durable_dir": "here"}
    job.start(durable(SHORT, slow_s=0.2, **options))
    kept = states(job.folder / "here")
    assert [path.name for path in kept] == ["step-0000000006"]
    assert not durable_folder_of(job).exists()
    # The interval is three steps, not two.
    assert min(event.fields["step"] for event in job.events("durable_written")) >= 3
    # torch's own loader can read it.
    wanted = {"parameter/head.weight": torch.full((3, 16), torch.nan)}
    dcp.load(wanted, checkpoint_id=str(kept[-1]), no_dist=True)
    assert not wanted["parameter/head.weight"].isnan().any()
    # A run with another run id resumes from it and trains longer.
    remove_arenas(job.run_id)
    before, job.run_id = job.run_id, new_run_id()
    assert job.start(durable(BASE, **options)).exit_code == 0
    assert f"step 6 of run {before} is the newest state left" in reason_of_last_start(job)
    assert states(job.folder / "here")[-1].name == "step-0000000012"
    assert [path.name for path in (job.folder / "lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.long
@pytest.mark.slow
def test_a_stop_writes_a_last_state_and_a_damaged_state_is_ignored(
    tmp_path: Path, job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    """Run the agent in its own process: it writes a last state before it exits."""
    assert _run_agent_until(job, written=1) == 128 + signal.SIGTERM
    before, newest = states(durable_folder_of(job))[-2:]
    committed = max(replica.version for replica in job.arena.inventory())
    assert newest.name == state_name(committed)
    assert job.events("stopped")
    # The arena has no complete version, so the last rung of the ladder is used.
    for path in job.arena.path.glob("shard-0001.*"):
        path.unlink()
    flip_bit(newest / "__1_0.distcp")
    assert job.start(durable()).exit_code == 0
    assert f"resumes from the durable state {before}" in reason_of_last_start(job)
    assert "ignored" in reason_of_last_start(job)
    assert "shard 1 of 2 has no replica" in reason_of_last_start(job)
    assert_identical(job, undisturbed(BASE))


def _run_agent_until(job: Run, *, written: int) -> int:
    """Run the agent until it has written `written` states, then send SIGTERM; return the exit code."""
    words = ["--nproc-per-node=2", f"--rdzv-id={job.run_id}", f"--run-root={job.folder / 'runs'}"]
    words += ["--durable-every-n-steps=2", f"--log-dir={job.folder / 'agent'}", "--redirects=3"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CKPTLESS_TRACE_DIR": str(job.folder / "trace")}
    options = replace(durable(slow_s=0.3), strategy_options="{}")
    command = [sys.executable, "-m", "lightning_ckptless.runner", *words, *command_for(options)]
    ledger = job.folder / "runs" / job.run_id / "ledger.jsonl"
    with subprocess.Popen(command, cwd=job.folder, env=env) as agent:
        try:
            while agent.poll() is None and len(read_ledger(ledger, only="durable_written")) < written:
                with suppress(subprocess.TimeoutExpired):
                    agent.wait(0.05)
            agent.terminate()
            return agent.wait(60)
        finally:
            agent.kill()
