"""The agent as a process: how it starts, and that signals leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.membership.conftest import REPOSITORY, worker_env

Write = Callable[..., Path]

# Each worker reports its start; its exit is visible as the end of its output.
WAITS = r"""
    import os, signal, sys, time
    def end(*_):
        os.write(1, b"ended\n")
        sys.exit(0)
    if "polite" in sys.argv:
        signal.signal(signal.SIGTERM, end)
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, b"up\n")  # in one piece, beside another worker
    time.sleep(1000)
"""

AGENT = [sys.executable, "-m", "lightning_ckptless.membership", "--nproc-per-node=2", "--shutdown-timeout=1"]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    env = worker_env({"PYTHONPATH": str(REPOSITORY)})
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_up(process: subprocess.Popen[str], workers: int = 2) -> None:
    assert process.stdout is not None
    for _ in range(workers):
        assert process.stdout.readline() == "up\n"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no-preload",)])
def test_a_killed_agent_takes_all_its_processes_with_it(options: tuple[str, ...], write: Write, tmp_path: Path) -> None:
    with started([*AGENT, *options, str(write(WAITS)), "deaf"], tmp_path) as agent:
        wait_until_up(agent)
        agent.kill()
        out, _ = agent.communicate()
        assert out == ""  # end of file: no process of the run has its output open any more
        assert agent.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "manner", "said"),
    [(signal.SIGTERM, "polite", "ended\nended\n"), (signal.SIGINT, "deaf", ""), (signal.SIGHUP, "plain", "")],
)
def test_a_signal_ends_the_workers(
    number: signal.Signals, manner: str, said: str, write: Write, tmp_path: Path
) -> None:
    with started([*AGENT, "--no-preload", str(write(WAITS)), manner], tmp_path) as agent:
        wait_until_up(agent)
        agent.send_signal(number)
        out, err = agent.communicate()
        assert (out, agent.returncode) == (said, 128 + number)
        assert f"asked to end by {number.name}" in err


def test_a_signal_before_the_workers_have_started(write: Write, tmp_path: Path) -> None:
    # The agent itself imports it. Its stdin stays open, so the import does not end.
    write("import sys; print('importing', flush=True); sys.stdin.read()", "torch.py")
    with started([*AGENT, str(write(WAITS))], tmp_path) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "importing\n"
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        assert (agent.stdout.read(), agent.returncode) == ("", 128 + signal.SIGTERM)


ASKED_TWICE = """
import os, signal, sys
from lightning_ckptless.membership.agent.signals import AskedToEnd, raising_on_signals
try:
    with raising_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
except AskedToEnd as request:
    os.kill(os.getpid(), signal.SIGHUP)
    sys.exit(128 + request.number)
"""


def test_a_second_signal_does_not_change_the_exit_code(tmp_path: Path) -> None:
    with started([sys.executable, "-c", ASKED_TWICE], tmp_path) as agent:
        assert (*agent.communicate(), agent.returncode) == ("", "", 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_run_that_cannot_start_says_why(write: Write, tmp_path: Path) -> None:
    with started([*AGENT, "--rdzv-backend=etcd", str(write(WAITS))], tmp_path) as agent:
        _, err = agent.communicate()
        assert (err, agent.returncode) == ("ckptless: --rdzv-backend etcd: expected c10d\n", 2)


COLD = """
    import os, sys
    if "RANK" in os.environ:
        agent, rank = os.environ["CKPTLESS_AGENT"], os.environ["RANK"]
        # At once: the other rank writes into the same pipe.
        os.write(1, f"{agent} {rank} {sys.argv} {__name__} {os.getcwd()} {sys.flags.optimize}\\n".encode())
        sys.exit(3 if "fail" in sys.argv else 0)
    from lightning_ckptless.membership.launch.reexec import replace_by_agent
    print("cold", os.getpid(), flush=True)
    os.chdir("/")
    replace_by_agent(nproc=2, run_root="runs", preload=("json",))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [("program.py",), pytest.param(("-m", "package.program"), marks=pytest.mark.long)])
def test_a_script_is_replaced_by_an_agent_that_runs_it(how: tuple[str, ...], write: Write, tmp_path: Path) -> None:
    write("", "package/__init__.py")
    path = write(COLD, "package/program.py" if "-m" in how else "program.py")
    with started([sys.executable, "-O", *how, "--lr", "fail"], tmp_path) as process:
        out, _ = process.communicate()
    cold, *workers = out.splitlines()
    assert (cold, process.returncode) == (f"cold {process.pid}", 3)
    name = str(path) if "-m" in how else "program.py"
    rows = {f"{process.pid} {rank} {[name, '--lr', 'fail']} __main__ {tmp_path} 1" for rank in (0, 1)}
    assert set(workers) <= rows
    assert workers


@pytest.mark.parametrize("how", [("-c",), ("-",)])
def test_a_script_that_is_no_file_is_refused(how: tuple[str, ...], tmp_path: Path) -> None:
    code = "from lightning_ckptless.membership.launch.reexec import replace_by_agent as r; r(nproc=1, run_root='')"
    done = subprocess.run(
        [sys.executable, *how, *([code] if how == ("-c",) else [])],
        input=code,
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=worker_env({"PYTHONPATH": str(REPOSITORY)}),
        check=False,
    )
    assert done.returncode == 1
    assert "LaunchError: each worker runs the same script again" in done.stderr
    assert os.listdir(tmp_path) == []
