"""The durable rung: everything is lost, shared memory too, and the run goes on from what was written beside it."""

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
from tests.faults.test_restart import Run, assert_identical, job, whole
from tests.lab.parts import Options

__all__ = ["job", "whole"]
SHORT = replace(BASE, epochs=1)


def durable(options: Options = BASE, *, slow_s: float = 0.0, **more: object) -> Options:
    """A run with durable states; `slow_s` is how long each version takes, where the writer is to meet several."""
    return replace(options, slow_mirror_s=slow_s, strategy_options=repr({"durable_every_n_steps": 2, **more}))


def lose_arenas(run_id: str) -> None:
    for info in find_arenas(default_arena_dir(), run_id):
        shutil.rmtree(info.path)


def states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def folder_of(job: Run) -> Path:
    return job.folder / "runs" / job.run_id / "durable"


def reason_of_last_start(job: Run) -> str:
    return str(job.events("run_started")[-1].fields["reason"])


def flip(path: Path) -> None:
    """Change one bit of what a rank has written first: its host state."""
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_the_newest_of_arena_and_state_is_taken(job: Run, whole: Callable[[Options], Variant]) -> None:
    job.start(durable(), "kill:rank=1:step=3")
    stale, place = job.folder / "stale", job.arena.path
    shutil.copytree(place, stale)
    assert job.start(durable(), "kill:rank=1:step=9").exit_code == 128 + 9
    # The arena has the version of the last state, or a newer one, and is quicker.
    assert "is complete" in reason_of_last_start(job)
    # As if the machine had been away, and another one had gone on from the durable states since.
    shutil.rmtree(place)
    shutil.move(stale, place)
    assert job.start(durable()).exit_code == 0
    assert re.search(r"newest state left, newer than step [12]", reason_of_last_start(job))
    assert_identical(job, whole(BASE))


def test_what_does_not_fit_is_refused(job: Run) -> None:
    job.start(durable(), "kill:rank=1:step=5")
    lose_arenas(job.run_id)
    outcome = job.start(durable(replace(BASE, optimization="two")), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "LayoutMismatchError" in job.output
    assert "optimizer/" in job.output


def test_a_folder_that_is_not_ours_is_refused(job: Run) -> None:
    (job.folder / "theirs").mkdir()
    (job.folder / "theirs" / "thesis.tex").write_text("")
    outcome = job.start(durable(durable_dir="theirs"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "OptionsError" in job.output and "thesis.tex" in job.output


def test_training_goes_on_where_no_state_can_be_written(job: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.start(durable(SHORT, slow_s=0.15, durable_dir="/proc/nowhere")).exit_code == 0
    failed = job.events("durable_failed")
    assert len(failed) >= 2
    assert "FileNotFoundError" in failed[0].fields["cause"]
    assert capfd.readouterr().err.count("writing the durable state of") == 1


def test_folder_number_and_interval_are_as_asked_for(job: Run) -> None:
    asked: dict[str, Any] = {"durable_keep": 1, "durable_every_n_steps": 3, "durable_dir": "here"}
    job.start(durable(SHORT, slow_s=0.2, **asked))
    kept = states(job.folder / "here")
    assert [path.name for path in kept] == ["step-0000000006"]
    assert not folder_of(job).exists()
    # Not at two, as every second one would be.
    assert min(event.fields["step"] for event in job.events("durable_written")) >= 3
    # Others read it as well.
    wanted = {"parameter/head.weight": torch.full((3, 16), torch.nan)}
    dcp.load(wanted, checkpoint_id=str(kept[-1]), no_dist=True)
    assert not wanted["parameter/head.weight"].isnan().any()
    # A run of another name goes on from it, and is longer.
    lose_arenas(job.run_id)
    before, job.run_id = job.run_id, new_run_id()
    assert job.start(durable(BASE, **asked)).exit_code == 0
    assert f"step 6 of run {before} is the newest state left" in reason_of_last_start(job)
    assert states(job.folder / "here")[-1].name == "step-0000000012"
    assert [path.name for path in (job.folder / "lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.long
@pytest.mark.slow
def test_asked_to_end_and_what_is_damaged_is_left_aside(
    tmp_path: Path, job: Run, whole: Callable[[Options], Variant]
) -> None:
    """The agent in a process of its own: it writes the last state before it ends."""
    assert _run_agent_until(job, written=1) == 128 + signal.SIGTERM
    before, newest = states(folder_of(job))[-2:]
    committed = max(replica.version for replica in job.arena.inventory())
    assert newest.name == state_name(committed)
    assert job.events("stopped")
    # What is left in the arena makes no version: the last rung of the ladder.
    for path in job.arena.path.glob("shard-0001.*"):
        path.unlink()
    flip(newest / "__1_0.distcp")
    assert job.start(durable()).exit_code == 0
    assert f"resumes from the durable state {before}" in reason_of_last_start(job)
    assert "ignored" in reason_of_last_start(job)
    assert "shard 1 of 2 has no replica" in reason_of_last_start(job)
    assert_identical(job, whole(BASE))


def _run_agent_until(job: Run, *, written: int) -> int:
    """Run the agent until so many states are written, then ask it to end."""
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
