"""Scripts that end by themselves: after fit, before fit in a way that cannot be repeated, or without ever exiting."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.program_failure import Failure, count_report, failure_of, report_failure
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.system import control_groups
from tests.control_groups import limited_memory
from tests.membership.conftest import script

Write = Callable[..., Path]

# The messages of a trainer, in a script that trains nothing.
TRAINS = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.membership.channel.exit_report import mark_begun
    from lightning_ckptless.protocol.messages import EnteredLoop, FitReturned, LeftLoop, ReachedFit

    rank, regrouping = int(os.environ["RANK"]), os.environ.get("CKPTLESS_REGROUPING", "0")
    options = {"in_place": True, "standbys": 0, "preload_imports": False, "hang_timeout_s": None, "obstacle": None}
    options |= {"straggler_factor": 1.5, "drain_stragglers_after_s": None}
    options |= {"fixed_world": "", "max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    channel = open_channel()

    def fit():
        channel.send(ReachedFit())
        channel.send(EnteredLoop(**options))
        mark_begun(rank)
        Path(f"came-{rank}").touch()
        while not all(Path(f"came-{other}").exists() for other in (0, 1)):
            time.sleep(0.002)

    def leave():
        channel.send(LeftLoop())
        channel.send(FitReturned())
"""


def launch(parent: ForkServer, text: str, write: Write, folder: Path, **settings: Any) -> Outcome:
    program = script(write(TRAINS + text))
    return run(LaunchConfig(program=program, nproc=2, cwd=folder, stop_grace_s=0.5, **settings), parent=parent)


def test_an_error_past_fit_ends_the_run_once(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
    fit()
    leave()
    if rank == 0:
        raise KeyError("mine")
    time.sleep(1000)
"""
    outcome = launch(bare, text, write, tmp_path)
    assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (1, 0, 0)
    assert not outcome.has_given_up
    said = capfd.readouterr().err
    assert said.count("KeyError: 'mine'\n") == 1
    assert "not relaunched: the script exited after fit (KeyError: 'mine')" in said


@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_code_past_fit_is_that_of_the_run(code: int, bare: ForkServer, write: Write, tmp_path: Path) -> None:
    outcome = launch(bare, f"    fit()\n    leave()\n    sys.exit({code})\n", write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (code, 0)


def test_a_kill_past_fit_is_recovered_from(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    text = """
    fit()
    leave()
    if rank == 0 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome = launch(bare, text, write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (0, 1)


def test_code_before_fit_that_cannot_be_repeated_is_reported_with_one_traceback(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
    if rank == 0:
        os.mkdir("results")
    else:
        while not Path("results").exists():
            time.sleep(0.002)
        if Path("came-1").exists():
            os.mkdir("results")
    fit()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
"""
    outcome = launch(bare, text, write, tmp_path)
    # In place at first; then all together, where both ranks fail alike.
    assert (outcome.exit_code, outcome.in_place, outcome.restarts) == (1, 1, 1)
    assert outcome.has_given_up
    said = capfd.readouterr().err
    assert "not in place: a new process ended before fit (FileExistsError:" in said
    assert "2 new processes in a row exited before fit (FileExistsError: [Errno 17] File exists: 'results')" in said
    # The two ranks stand at different lines.
    assert said.count("Traceback (most recent call last)") <= 2


@pytest.mark.timeout(30)
def test_a_process_that_reports_an_error_and_does_not_exit_is_killed(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
    fit()
    leave()
    if rank == 0:
        threading.Thread(target=threading.Event().wait).start()
        raise ValueError("mine")
    time.sleep(1000)
"""
    outcome = launch(bare, text, write, tmp_path, exit_grace_s=0.2)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "ValueError: mine was reported 0 s ago, but the process has not exited" in capfd.readouterr().err


def test_a_failure_tells_whether_a_peer_was_lost(tmp_path: Path) -> None:
    import torch.distributed  # noqa: F401 - as in a worker that has trained

    env = {environment.AGENT_DIR: str(tmp_path)}
    for error, expected in (
        (
            RuntimeError("gloo: Connection closed by peer"),
            Failure("RuntimeError: gloo: Connection closed by peer", True),
        ),
        (ValueError("two\nlines"), Failure("ValueError: two lines")),
        (SystemExit(3), Failure("sys.exit(3)")),
    ):
        report_failure(error, env)
        assert failure_of(tmp_path, os.getpid()) == expected
    assert failure_of(tmp_path, 1) is None
    assert json.loads((tmp_path / f"failure-{os.getpid()}.json").read_text())["error"] == "sys.exit(3)"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error with a traceback and a cause."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def test_reports_of_the_same_traceback_are_counted(tmp_path: Path) -> None:
    env = {environment.AGENT_DIR: str(tmp_path)}
    refused = "connection to 127.0.0.1:{} refused by rank {}"
    with (tmp_path / "log-0").open("w") as first, (tmp_path / "log-1").open("w") as second:
        one, other = first.fileno(), second.fileno()
        assert count_report(raised(OSError(refused.format(40001, 0))), one, env) == 1
        assert count_report(raised(OSError(refused.format(40002, 1))), one, env) == 2
        assert count_report(raised(OSError(refused.format(40002, 1))), other, env) == 1, "who reads this log sees none"
        assert count_report(OSError(refused.format(40003, 2)), one, env) == 1, "it was raised elsewhere"
        assert count_report(raised(OSError(refused.format(1, 1)), KeyError("x")), one, env) == 1, "of another cause"
        assert count_report(raised(OSError("connection lost")), one, env) == 1
        assert count_report(raised(OSError("connection lost")), one, {}) == 1


def test_a_traceback_of_all_ranks_and_starts_is_printed_once(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = launch(bare, '    raise RuntimeError(f"rank {rank}: no thread can be started")\n', write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (1, 2)
    said = capfd.readouterr().err
    assert said.count("Traceback (most recent call last)") == 1
    assert "no thread can be started (the same traceback as above, 3 times so far)" in said


def test_an_abort_before_training_ends_the_run_after_three_starts(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = launch(bare, "    os.abort()\n", write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (128 + signal.SIGABRT, 2)
    assert outcome.has_given_up
    said = capfd.readouterr().err
    assert re.search(r"not relaunched: ranks? \S+( 1)? crashed 3 times in a row before fit \(SIGABRT\)", said)
    assert "PYTHONFAULTHANDLER=1" in said


# Rank 1 dies at step 3 as the kernel kills a process: after the count in its cgroup has risen.
STARVED = """
    from lightning_ckptless.membership.worker.progress import ProgressWriter
    from lightning_ckptless.protocol.hang_detection import Point

    channel.send(ReachedFit())
    channel.send(EnteredLoop(**options))
    progress = ProgressWriter.from_environment()
    progress.beat(3, Point.BACKWARD)
    if rank == 1:
        events = Path("cgroup/memory.events")
        kills = int(events.read_text().split()[-1])
        if sys.argv[1:] == ["counted"]:
            events.write_text(f"oom {kills + 1}\\noom_kill {kills + 1}\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("how", "faults", "reason"),
    [
        ("counted", 4, "rank 1 crashed 4 times in a row at step 3 (SIGKILL)"),
        ("", 7, "max_recoveries_without_progress=6 allows no more"),
    ],
)
def test_a_kill_for_lack_of_memory_is_distinguished_from_one_from_outside(
    how: str,
    faults: int,
    reason: str,
    bare: ForkServer,
    write: Write,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_groups, "PROC", limited_memory(tmp_path, kills=5, limit="536870912"))
    text = STARVED.replace("sys.argv[1:]", repr([how]))
    outcome = launch(bare, text, write, tmp_path, max_recoveries_without_progress=6)
    assert (outcome.exit_code, len(outcome.faults), outcome.has_given_up) == (128 + 9, faults, True)
    said = capfd.readouterr().err
    assert reason in said
    if how:
        assert "died by SIGKILL for lack of memory: the kernel has killed 1 process in cgroup " in said
        assert "The kernel has killed 4 processes" in said
    assert ("a limit of 512 MiB" in said) is bool(how)
