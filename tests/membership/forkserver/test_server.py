"""The fork server: what it refuses, what it reports, and that nothing survives it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.forkserver.client import ForkServer, ForkServerLostError, UnsafeForkError
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from tests.membership.conftest import REPOSITORY, finish, run_forked, script, start, worker_env

SLEEP = "import time; time.sleep(1000)"


def job(path: Path, *, fresh: bool = False) -> Job:
    return Job(script(path), worker_env(), str(path.parent), fresh)


def test_a_missing_module_is_named() -> None:
    with (
        ForkServer(("json", "no_such_module")) as parent,
        pytest.raises(LaunchError, match="preload no_such_module"),
    ):
        parent.ready()


def test_modules_are_looked_up_in_the_given_folders(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write("loaded = True", "extras/extra.py").parent
    program = script(write("import sys; print('extra' in sys.modules, sys.path[0], sys.path.count(sys.path[0]))"))
    with ForkServer(("extra",), path=(str(folder),)) as parent:
        assert run_forked(parent, program, tmp_path).out == f"True {tmp_path} 1\n"


def test_more_modules_can_be_added(write: Callable[..., Path], tmp_path: Path) -> None:
    program = script(write("import sys; print('colorsys' in sys.modules)"))
    with ForkServer() as parent:
        assert run_forked(parent, program, tmp_path).out == "False\n"
        parent.preload(("colorsys",))
        assert run_forked(parent, program, tmp_path).out == "True\n"


def test_it_keeps_the_options_of_the_interpreter(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("import sys; print(sys.flags.optimize, sys._xoptions, sys.warnoptions)")
    with ForkServer(flags=("-O", "-Xdemo=1", "-Wignore")) as parent:
        assert run_forked(parent, script(path), tmp_path).out == "1 {'demo': '1'} ['ignore']\n"


THREADED = """
import threading
named, for_ever = threading.Event(), threading.Event()

def run():
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
        comm.write("NAME")
    named.set()
    for_ever.wait()

threading.Thread(target=run, daemon=True).start()
named.wait()
"""


def test_it_forks_when_its_threads_are_known_to_be_safe(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(THREADED.replace("NAME", "jemalloc_bg_thd"), "extras/threaded.py").parent
    path = write("import os; print(len(os.listdir('/proc/self/task')))")
    with ForkServer(("threaded",), path=(str(folder),)) as parent:
        assert finish(parent, start(parent, job(path), tmp_path), tmp_path).out == "1\n"


def test_it_does_not_fork_when_it_has_threads(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(THREADED.replace("NAME", "somebody's"), "extras/threaded.py").parent
    path = write("print('ran')")
    with ForkServer(("threaded",), path=(str(folder),)) as parent:
        with pytest.raises(UnsafeForkError, match="has started threads: somebody's"):
            start(parent, job(path), tmp_path)
        assert finish(parent, start(parent, job(path, fresh=True), tmp_path), tmp_path).out == "ran\n"


def test_a_fork_closes_the_files_of_the_fork_server(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    waiting = start(bare, job(write(SLEEP, "waiting.py")), tmp_path)
    try:
        listing = write("import os; print(sorted(os.listdir('/proc/self/fd')))")
        assert run_forked(bare, script(listing), tmp_path).out == "['0', '1', '2', '3']\n"  # 3 is the listing's own
    finally:
        bare.signal([waiting.pid], signal.SIGKILL)
        finish(bare, waiting, tmp_path)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_worker_takes_its_processes_with_it(
    fresh: bool, bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("import os, time; os.fork(); print(os.getpid(), os.getsid(0), flush=True); time.sleep(1000)")
    reader, writer = os.pipe()
    worker = bare.fork(job(path, fresh=fresh), (0, writer, 2))
    os.close(writer)
    with os.fdopen(reader) as lines:
        pids = {int(lines.readline().split()[0]) for _ in range(2)}
        assert worker.pid in pids
        os.kill(worker.pid, signal.SIGKILL)
        assert bare.end_of(worker).exit_code == -signal.SIGKILL
        assert lines.read() == ""  # end of file: no process has the pipe open any more
    os.close(worker.pidfd)


def test_signals_reach_workers_that_were_just_forked(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(SLEEP)
    for _ in range(20):
        worker = start(bare, job(path), tmp_path)
        bare.signal([worker.pid, 2**22], signal.SIGKILL)
        assert finish(bare, worker, tmp_path).exit_code == -signal.SIGKILL


def test_closing_it_ends_its_workers(write: Callable[..., Path], tmp_path: Path) -> None:
    with ForkServer() as parent:
        workers = [start(parent, job(write(SLEEP), fresh=fresh), tmp_path) for fresh in (False, True)]
    assert not any(psutil.pid_exists(worker.pid) for worker in workers)
    for worker in workers:
        os.close(worker.pidfd)


def test_its_death_ends_its_workers_and_is_reported(write: Callable[..., Path], tmp_path: Path) -> None:
    with ForkServer() as parent:
        workers = [start(parent, job(write(SLEEP), fresh=fresh), tmp_path) for fresh in (False, True)]
        assert parent.pid is not None
        os.kill(parent.pid, signal.SIGKILL)
        for worker in workers:
            select.select([worker.pidfd], [], [])
            with pytest.raises(ForkServerLostError):
                parent.end_of(worker)
            os.close(worker.pidfd)
        # The handle can be used on: it starts another one.
        assert run_forked(parent, script(write("print('again')")), tmp_path).out == "again\n"


@pytest.mark.parametrize("importing", [False, True])
def test_no_process_survives_the_agent(importing: bool, write: Callable[..., Path], tmp_path: Path) -> None:
    """Every process that holds the write end of a pipe has exited once the agent is killed."""
    stuck = write(SLEEP, "stuck.py")
    text = f"""
        import os, sys
        from lightning_ckptless.membership.forkserver.client import ForkServer
        from tests.membership.conftest import script, worker_env
        from lightning_ckptless.membership.worker.startup import Job
        if {importing}:
            parent = ForkServer(("stuck",), path=({str(tmp_path)!r},)).start()
        else:
            parent = ForkServer().start()
            for fresh in (False, True):
                parent.fork(Job(script({str(stuck)!r}), worker_env(), "/", fresh))
        print("up", flush=True)
        sys.stdin.read()
    """
    agent = subprocess.Popen(
        [sys.executable, write(text, "agent.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=worker_env({"PYTHONPATH": str(REPOSITORY)}),
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    with agent.stdin, agent.stdout:
        assert agent.stdout.readline() == b"up\n"
        agent.kill()
        assert agent.stdout.read() == b""
    agent.wait()


def test_two_threads_can_use_one_fork_server(bare: ForkServer, write: Callable[..., Path], tmp_path: Path) -> None:
    found: dict[int, int] = {}

    def use(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(f"import sys; sys.exit({number})", f"{number}.py")
        found[number] = run_forked(bare, Program("script", str(path)), folder).exit_code

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(8)}
