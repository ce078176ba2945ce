"""A fork server that is killed at the very moment it forks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.forkserver import fallback
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import run
from tests.membership.conftest import script

# Preloaded: kills the fork server before the given forks, counted over all fork servers of the run.
TRAP = """
    import os, signal
    from pathlib import Path

    here, names = Path({folder!r}), {names!r}

    def spring():
        number = len(list(here.glob("fork-*")))
        (here / f"fork-{{number}}").touch()
        if number in names:
            os.kill(os.getpid(), signal.SIGKILL)

    os.register_at_fork(before=spring)
"""
# Each rank trains until all ranks do; in the first generation rank 0 then kills itself.
WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.protocol.messages import EnteredLoop, LeftLoop

    rank, channel, count = int(os.environ["RANK"]), open_channel(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    options = {"standbys": 0, "preload_imports": False, "hang_timeout_s": None, "obstacle": None, "fixed_world": ""}
    options |= {"straggler_factor": 1.5, "drain_stragglers_after_s": None}
    options |= {"max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    channel.send(EnteredLoop(in_place=sys.argv[1] == "in-place", **options))
    Path(f"came-{rank}-{count}").touch()
    while not all(Path(f"came-{other}-{count}").exists() for other in (0, 1)):
        time.sleep(0.005)
    if count == "0" and sys.argv[1] != "whole":
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    channel.send(LeftLoop())
"""


# Preloaded: those forks whose numbers are named fail, as at a limit on processes.
LIMIT = """
    import errno, os
    from pathlib import Path

    here, names, fork = Path({folder!r}), {names!r}, os.fork

    def limited():
        number = len(list(here.glob("fork-*")))
        (here / f"fork-{{number}}").touch()
        if number in names:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = limited
"""


@pytest.fixture
def trapped(write: Callable[..., Path], tmp_path: Path) -> Callable[..., Outcome]:
    """Runs two workers whose parent is killed, or at its limit, before the forks with these numbers."""

    def trapped(how: str, names: list[int], trap: str = TRAP, **settings: Any) -> Outcome:
        write(trap.format(folder=str(tmp_path), names=names), "trap.py")
        program = script(write(WORKER), how)
        return run(LaunchConfig(program=program, nproc=2, cwd=tmp_path, preload=("trap",), **settings))

    return trapped


@pytest.mark.parametrize("moment", [0, 1])
def test_loss_of_the_fork_server_when_the_run_starts(
    moment: int, trapped: Callable[..., Outcome], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trapped("whole", [moment]) == Outcome(0, 0, ())
    assert len(list(tmp_path.glob("fork-*"))) == moment + 3
    assert capfd.readouterr().err.count("and all its workers with it; starting a new fork server and all workers") == 1


def test_loss_of_the_fork_server_during_a_relaunch(
    trapped: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = trapped("relaunch", [3], max_restarts=1)
    assert (outcome.exit_code, outcome.restarts, len(outcome.faults)) == (0, 1, 1)
    assert capfd.readouterr().err.count("starting a new fork server") == 1


def test_loss_of_the_fork_server_when_a_lost_rank_is_replaced(trapped: Callable[..., Outcome]) -> None:
    # All other workers die with the fork server, so all are started again.
    outcome = trapped("in-place", [2], max_restarts=2)
    assert (outcome.exit_code, outcome.restarts, outcome.in_place, len(outcome.faults)) == (0, 1, 1, 2)


def test_repeated_loss_of_the_fork_server(
    trapped: Callable[..., Outcome], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trapped("whole", list(range(9))) == Outcome(0, 0, ())
    assert len(list(tmp_path.glob("fork-*"))) == 3
    said = capfd.readouterr().err
    assert said.count("starting a new fork server") == 2
    assert said.count("workers are started as new interpreters from now on") == 1 and "3 times in a row" in said


def test_at_a_limit_on_processes_when_a_lost_rank_is_replaced(
    trapped: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = trapped("in-place", [2], LIMIT, max_restarts=2)
    assert (outcome.exit_code, outcome.restarts, outcome.in_place, len(outcome.faults)) == (0, 1, 1, 2)
    said = capfd.readouterr().err
    assert "not in place: no new process can be started: [Errno 11]" in said and "`pids.max`" in said
    assert "Traceback" not in said


def test_at_a_limit_on_processes_during_a_relaunch(
    trapped: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = trapped("relaunch", [3], LIMIT, max_restarts=1)
    assert (outcome.exit_code, outcome.restarts, len(outcome.faults)) == (0, 1, 1)
    assert capfd.readouterr().err.count("starting all workers again in 0.5 s") == 1


def test_a_limit_on_processes_that_stays_ends_the_run(
    trapped: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "_PAUSE_S", 0.001)
    with pytest.raises(LaunchError, match="no new process can be started"):
        trapped("whole", list(range(9)), LIMIT)
