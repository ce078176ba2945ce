"""Coordinated stop: all ranks stop after the same step, and the last line says what is kept and how to resume."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.protocol.versions import Complete, Version, newest_complete
from lightning_ckptless.testing.drill import Variant
from lightning_ckptless.testing.starters import program_of
from tests.faults.conftest import LAB, REPOSITORY, command_for
from tests.faults.matrix import BASE
from tests.faults.test_restart import Run, assert_identical, job, undisturbed
from tests.lab.parts import Options

__all__ = ["job", "undisturbed"]


def test_a_single_rank_stops_after_the_current_step(job: Run, undisturbed: Callable[[Options], Variant]) -> None:
    # Without the stop, the next version would be due at step 8.
    long = replace(BASE, devices=1, samples=80, epochs=1)
    options = replace(long, strategy_options="{'mirror_every_n_steps': 4}")
    assert job.start(replace(options, terminate_at=6)).exit_code == 128 + signal.SIGTERM
    assert [event.fields["cause"] for event in job.events("stopped")] == ["SIGTERMException"]
    found = newest_complete(job.arena.inventory())
    assert isinstance(found, Complete) and found.snapshot.version == Version(6, True)
    assert job.start(options).exit_code == 0
    assert_identical(job, undisturbed(long))


@pytest.mark.parametrize(
    "strategy_options",
    [pytest.param({"on_late": "skip"}, marks=pytest.mark.long), {"mirror_every_n_steps": 4}],
    ids=str,
)
def test_all_ranks_stop_after_the_same_step(
    strategy_options: dict[str, object], job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    # Mirroring is slower than a step, so a version is in flight at any time. The ranks agree long before the last step.
    long = replace(BASE, samples=144)
    options = replace(long, strategy_options=repr(strategy_options), slow_mirror_s=0.1)
    assert job.start(replace(options, terminate_at=5)).exit_code == 128 + signal.SIGTERM
    assert {(event.rank, event.fields["cause"]) for event in job.events("stopped")} == {
        (rank, "SIGTERMException") for rank in (0, 1)
    }
    found = newest_complete(job.arena.inventory())
    assert isinstance(found, Complete) and found.snapshot.version.optimizer_step in range(5, 36)
    assert job.start(options).exit_code == 0
    assert_identical(job, undisturbed(long))


AGENT = [sys.executable, "-m", "lightning_ckptless.runner"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("how", ["sighup", "gave_up"])
def test_the_last_line_shows_the_command_to_resume(
    how: str, job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    job.config = LaunchConfig(program=program_of([str(LAB)]), run_id=job.run_id, run_root=job.folder / "runs")
    words = ["--nproc-per-node=2", f"--run-root={job.folder / 'runs'}", f"--log-dir={job.folder / 'agent'}"]
    # A run that gives up does not need a run id.
    words += ["--redirects=3", *([f"--rdzv-id={job.run_id}"] if how == "sighup" else ["--max-restarts=0"])]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CKPTLESS_TRACE_DIR": str(job.folder / "trace")}
    env["CKPTLESS_FAULTS"] = "kill:rank=1:step=7" if how == "gave_up" else ""
    script = command_for(replace(BASE, slow_mirror_s=0.3 if how == "sighup" else 0.0))
    output = _run_until_committed([*AGENT, *words, *script], job, env, ask=how == "sighup")
    last = output.splitlines()[-1]
    assert " of the run is kept in shared memory; continue with: ckptless run " in last
    again = shlex.split(last.partition("continue with: ckptless run ")[2])
    again = [word for word in again if word != "--max-restarts=0"]
    assert subprocess.run([*AGENT, *again], cwd=job.folder, env=env, check=False).returncode == 0
    assert_identical(job, undisturbed(BASE))


@pytest.mark.long
@pytest.mark.slow
def test_a_run_without_a_run_id_keeps_nothing_and_says_so(job: Run) -> None:
    job.config = LaunchConfig(program=program_of([str(LAB)]), run_id=job.run_id, run_root=job.folder / "runs")
    words = ["--nproc-per-node=2", f"--run-root={job.folder / 'runs'}", f"--log-dir={job.folder / 'agent'}"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    script = command_for(replace(BASE, slow_mirror_s=0.3))
    output = _run_until_committed([*AGENT, *words, "--redirects=3", *script], job, env, ask=True)
    assert " of the run is not kept: no run id was given." in output.splitlines()[-1]


def _run_until_committed(command: list[str], job: Run, env: dict[str, str], *, ask: bool) -> str:
    """Run an agent and return its stderr; with `ask`, send SIGHUP once a step is committed."""
    with subprocess.Popen(command, cwd=job.folder, env=env, stderr=subprocess.PIPE, text=True) as agent:
        try:
            while ask and agent.poll() is None and not _committed(job):
                with suppress(subprocess.TimeoutExpired):
                    agent.wait(0.05)
            if ask:
                agent.send_signal(signal.SIGHUP)
            output = agent.communicate(timeout=120)[1]
        finally:
            agent.kill()
    assert agent.returncode == 128 + (signal.SIGHUP if ask else signal.SIGKILL)
    return output


def _committed(job: Run) -> bool:
    ledgers = (job.folder / "runs").glob("*/ledger.jsonl")
    return any(len(read_ledger(ledger, only="committed")) for ledger in ledgers)
