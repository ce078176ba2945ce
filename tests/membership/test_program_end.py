"""Programs that end by themselves: past fit, in a head that cannot be repeated, or with something that never ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.failure import Failure, failure_of, is_reported_already, leave_failure
from lightning_ckptless.membership.launch import LaunchConfig, Outcome, run
from lightning_ckptless.membership.parent import PreloadedParent
from tests.membership.conftest import script

Write = Callable[..., Path]

# What a trainer tells, in a program that trains nothing.
TRAINS = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from lightning_ckptless.membership.control import open_line
    from lightning_ckptless.membership.verdict import mark_begun

    rank, regrouping = int(os.environ["RANK"]), os.environ.get("CKPTLESS_REGROUPING", "0")
    wishes = {"in_place": True, "standbys": 0, "hang_timeout_s": None, "obstacle": None, "fixed_world": ""}
    wishes |= {"max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    line = open_line()

    def fit():
        line.tell("came_to_fit")
        line.tell("entered", **wishes)
        mark_begun(rank)
        Path(f"came-{rank}").touch()
        while not all(Path(f"came-{other}").exists() for other in (0, 1)):
            time.sleep(0.002)

    def leave():
        line.tell("left")
        line.tell("past_fit")
"""


def launch(parent: PreloadedParent, text: str, write: Write, folder: Path, **settings: Any) -> Outcome:
    program = script(write(TRAINS + text))
    return run(LaunchConfig(program=program, nproc=2, cwd=folder, stop_grace_s=0.5, **settings), parent=parent)


def test_an_error_past_fit_ends_the_run_once(
    bare: PreloadedParent, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    assert "not relaunched: the program itself ended past fit (KeyError: 'mine')" in said


@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_past_fit_is_that_of_the_run(code: int, bare: PreloadedParent, write: Write, tmp_path: Path) -> None:
    outcome = launch(bare, f"    fit()\n    leave()\n    sys.exit({code})\n", write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (code, 0)


def test_a_kill_past_fit_is_recovered_from(bare: PreloadedParent, write: Write, tmp_path: Path) -> None:
    text = """
    fit()
    leave()
    if rank == 0 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome = launch(bare, text, write, tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (0, 1)


def test_a_head_that_cannot_be_repeated_is_told_with_its_traceback_once(
    bare: PreloadedParent, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    assert "2 new processes in a row ended before fit (FileExistsError: [Errno 17] File exists: 'results')" in said
    # The two ranks stand at different lines.
    assert said.count("Traceback (most recent call last)") <= 2


@pytest.mark.timeout(30)
def test_a_process_that_reports_an_error_and_does_not_end_is_ended(
    bare: PreloadedParent, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    assert "ValueError: mine was reported 0 s ago, and it has not ended" in capfd.readouterr().err


def test_a_failure_says_whether_a_peer_was_lost(tmp_path: Path) -> None:
    import torch.distributed  # noqa: F401 - as in a worker that has trained

    env = {environment.VERDICT_DIR: str(tmp_path)}
    for error, expected in (
        (
            RuntimeError("gloo: Connection closed by peer"),
            Failure("RuntimeError: gloo: Connection closed by peer", True),
        ),
        (ValueError("two\nlines"), Failure("ValueError: two lines")),
        (SystemExit(3), Failure("sys.exit(3)")),
    ):
        leave_failure(error, env)
        assert failure_of(tmp_path, os.getpid()) == expected
    assert failure_of(tmp_path, 1) is None
    assert json.loads((tmp_path / f"failure-{os.getpid()}.json").read_text())["error"] == "sys.exit(3)"


def test_a_traceback_is_reported_by_the_first_of_those_that_raise_it(tmp_path: Path) -> None:
    env = {environment.VERDICT_DIR: str(tmp_path)}
    assert not is_reported_already(ValueError("once"), env)
    assert is_reported_already(ValueError("once"), env)
    assert not is_reported_already(ValueError("another"), env)
    assert not is_reported_already(ValueError("once"), {})
