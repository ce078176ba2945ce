"""Runs of one node: exit codes, relaunches, what the workers receive, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import main, run
from lightning_ckptless.membership.worker.program import Program
from tests.membership.conftest import REPOSITORY, script

Write = Callable[..., Path]

# Rank 1 fails in the first `times` generations; the others wait for it, and cannot exit by themselves.
FAILS = """
    import json, os, signal, sys, time
    times, how = int(sys.argv[1]), sys.argv[2]
    rank, count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with open(f"seen-{rank}-{count}.json", "w") as file:
        json.dump(dict(os.environ), file)
    if count >= times:
        sys.exit(0)
    if rank != 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    while not os.path.exists(f"seen-0-{count}.json"):
        time.sleep(0.001)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))
"""


class Ledger:
    """Keeps the events of a run."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def launch(parent: ForkServer, program: Program, folder: Path, record: Any = None, **settings: Any) -> Outcome:
    config = LaunchConfig(**{"program": program, "nproc": 2, "cwd": folder, "stop_grace_s": 0.5, **settings})
    return run(config, parent=parent, record=record or Ledger())


def seen(folder: Path, rank: int, count: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / f"seen-{rank}-{count}.json").read_text())
    return found


@pytest.mark.parametrize("fresh", [False, True])
def test_success(fresh: bool, bare: ForkServer, write: Write, tmp_path: Path) -> None:
    program = script(write(FAILS), "0", "killed")
    assert launch(bare, program, tmp_path, fresh=fresh, run_root=tmp_path / "runs") == Outcome(0, 0, ())
    for rank in (0, 1):
        env = seen(tmp_path, rank, 0)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert env[environment.AGENT] == str(os.getpid())
        assert env[environment.NODE].endswith(f"-{os.getpid()}")
        assert env[environment.RUN_ROOT] == str(tmp_path / "runs")
        assert environment.FAULT_REPORT not in env
        assert (environment.MAIN_AT in env) is not fresh


@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_worker_is_relaunched_with_the_others(
    fresh: bool, bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger()
    outcome = launch(bare, script(write(FAILS), "2", "killed"), tmp_path, ledger, fresh=fresh, max_restarts=5)
    assert (outcome.exit_code, outcome.restarts, len(outcome.faults)) == (0, 2, 2)
    assert [(f.rank, f.signal_name, f.restart, f.world_size) for f in outcome.faults] == [
        (1, "SIGKILL", 1, 2),
        (1, "SIGKILL", 2, 2),
    ]
    assert all(fault.died_at <= fault.detected_at <= fault.stopped_at for fault in outcome.faults)
    for count, fault in enumerate(outcome.faults, start=1):
        assert FaultReport.from_json(seen(tmp_path, 0, count)[environment.FAULT_REPORT]) == fault
    started = ["fault", "workers_spawned", "relaunch"] * 2
    assert ledger.names() == ["agent_started", "workers_spawned", *started, "agent_ended"]
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"ckptless: {fault}; all 2 workers relaunched, recovery {fault.restart} of the run, {fault.restart} without a "
        "new step (not in place: no worker has reached fit yet)"
        for fault in outcome.faults
    ]


@pytest.mark.parametrize(("how", "code"), [("killed", 137), ("3", 3)])
def test_a_run_ends_with_the_code_of_its_culprit(
    how: str, code: int, bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = launch(bare, script(write(FAILS), "9", how), tmp_path, max_restarts=1)
    assert (outcome.exit_code, outcome.restarts, len(outcome.faults)) == (code, 1, 2)
    assert outcome.has_given_up
    assert "the run had 1, and the launcher's --max-restarts allows no more" in capfd.readouterr().err


def test_a_final_exit_report_prevents_relaunches(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
        import os, sys, time
        from lightning_ckptless.membership.channel.exit_report import ExitReport, write_exit_report
        if os.environ["RANK"] == "0":
            write_exit_report(ExitReport(0, True, "the loss is not a number"))
            sys.exit(4)
        time.sleep(1000)
    """
    outcome = launch(bare, script(write(text)), tmp_path)
    assert (outcome.exit_code, outcome.restarts, len(outcome.faults)) == (4, 0, 1)
    assert not outcome.has_given_up
    assert "exited with code 4; not relaunched: the loss is not a number" in capfd.readouterr().err


def test_a_script_that_never_trains_is_given_up(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begins = "from lightning_ckptless.membership.channel.exit_report import mark_begun; mark_begun(0)"
    for text, starts in (("import sys; sys.exit(6)", 3), (f"{begins}; import sys; sys.exit(6)", 5)):
        outcome = launch(bare, script(write(text)), tmp_path, nproc=1, max_restarts=4)
        assert (outcome.exit_code, outcome.restarts) == (6, starts - 1)
    assert "3 starts in a row exited before completing a step, the last with sys.exit(6)" in capfd.readouterr().err


def test_exit_reports_that_are_not_final_change_nothing(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    text = """
        import os, sys
        from lightning_ckptless.membership.channel.exit_report import ExitReport, write_exit_report
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            write_exit_report(ExitReport(int(os.environ["RANK"]), False, "once more"))
            sys.exit(4)
    """
    assert launch(bare, script(write(text)), tmp_path).exit_code == 0


def test_survivors_of_the_last_fault_may_exit_in_order(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    text = """
        import os, signal, sys, time
        if os.environ["RANK"] == "1":
            while not os.path.exists("ready"):
                time.sleep(0.001)
            sys.exit(5)
        def end(*_):
            open("ended", "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open("ready", "w").close()
        time.sleep(1000)
    """
    assert launch(bare, script(write(text)), tmp_path, max_restarts=0, stop_grace_s=60).exit_code == 5
    assert (tmp_path / "ended").exists()


def test_a_fork_server_that_cannot_fork_is_replaced(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "extras/threaded.py"
    )
    with ForkServer(("threaded",), path=(str(tmp_path / "extras"),)) as parent:
        outcome = launch(parent, script(write(FAILS), "2", "killed"), tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (0, 2)
    assert capfd.readouterr().err.count("workers are started as new interpreters from now on") == 1


def test_a_run_with_its_own_fork_server(write: Write, tmp_path: Path) -> None:
    write("value = 1", "beside.py")
    program = script(write("import sys; sys.exit('beside' not in sys.modules)"))
    assert run(LaunchConfig(program=program, cwd=tmp_path, preload=("beside",))).exit_code == 0


@pytest.mark.parametrize("fresh", [False, True])
def test_the_loss_of_the_fork_server_is_a_fault_like_others(fresh: bool, write: Write, tmp_path: Path) -> None:
    text = """
        import os, signal, time
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if os.environ["RANK"] == "1":
                # It waits once it has reported this worker to the agent.
                while open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[0] != "S":
                    pass
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
    """
    outcome = run(LaunchConfig(program=script(write(text)), nproc=2, cwd=tmp_path, preload=("json",), fresh=fresh))
    assert (outcome.exit_code, outcome.restarts) == (0, 1)
    assert outcome.faults[0].signal_name == "SIGKILL"


def test_a_module_that_cannot_be_preloaded_ends_the_run(write: Write, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot preload nowhere"):
        run(LaunchConfig(program=script(write("")), cwd=tmp_path, preload=("nowhere",)))


def test_any_executable_can_be_a_worker(bare: ForkServer, tmp_path: Path) -> None:
    assert launch(bare, Program("executable", "sh", ("-c", "exit $RANK")), tmp_path, max_restarts=0).exit_code == 1
    assert launch(bare, Program("executable", "no-such-program"), tmp_path, max_restarts=0).exit_code == 127


def test_output_can_go_to_files_and_the_console(
    bare: ForkServer, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script(write("import os, sys; print('out', os.environ['RANK']); print('err', file=sys.stderr)"))
    prefix = "[${role_name} ${rank}] "
    launch(bare, program, tmp_path, log_dir=tmp_path / "logs", tee="1", redirects="2", log_line_prefix=prefix)
    assert sorted(capfd.readouterr().out.splitlines()) == ["[default 0] out 0", "[default 1] out 1"]
    assert [path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")] == ["err\n"] * 2


def test_an_exception_from_outside_stops_the_workers(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    def interrupt(event: str, **_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(bare, script(write("import time; time.sleep(1000)")), tmp_path, interrupt)


def test_in_a_thread(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    found: list[Outcome] = []
    program = script(write(FAILS), "1", "killed")
    thread = threading.Thread(target=lambda: found.append(launch(bare, program, tmp_path)))
    thread.start()
    thread.join()
    assert [(outcome.exit_code, outcome.restarts) for outcome in found] == [(0, 1)]


@pytest.mark.long
def test_twenty_relaunches_cost_no_files_and_no_threads(bare: ForkServer, write: Write, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []

    def count(event: str, **_: Any) -> None:
        if event == "workers_spawned":
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))

    program = script(write(FAILS), "20", "killed")
    outcome = launch(bare, program, tmp_path, count, max_recoveries_without_progress=20)
    assert (outcome.exit_code, outcome.restarts) == (0, 20)
    assert max(counts[5:]) <= max(counts[:5])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nproc": 0}, "nproc=0"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"max_recoveries_without_progress": -1}, "max_recoveries_without_progress=-1"),
        ({"max_recoveries_per_hour": -1}, "max_recoveries_per_hour=-1"),
        ({"nnodes": "2:1"}, "nnodes='2:1'"),
        ({"nnodes": "many"}, "nnodes='many'"),
        ({"nnodes": "2"}, "several nodes need a rendezvous"),
        ({"nnodes": "2:4", "rdzv_endpoint": "a:1,b:1"}, "minimum number of nodes to 3"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionsError, match=text):
        LaunchConfig(program=Program("script", "train.py"), **settings)


def test_a_run_whose_workers_cannot_be_restarted_has_given_up(
    write: Write, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def cannot(*_: object) -> Outcome:
        raise LaunchError("no new process can be started")

    monkeypatch.setattr("lightning_ckptless.membership.launch.node.run_node", cannot)
    seen: list[Outcome | None] = []

    def ended(_: LaunchConfig, outcome: Outcome | None) -> str:
        seen.append(outcome)
        return "continue with: it"

    assert main(["--no-preload", "--standalone", str(write(""))], ended=ended) == 2
    assert [outcome is not None and outcome.has_given_up for outcome in seen] == [True]
    assert capfd.readouterr().err == "ckptless: no new process can be started\nckptless: continue with: it\n"


def test_runs_have_different_names() -> None:
    names = {LaunchConfig(program=Program("script", "train.py")).run_id for _ in range(20)}
    assert len(names) == 20


def test_light_modules_import_no_torch() -> None:
    names = (
        "membership.launch.launch",
        "membership.launch.reexec",
        "membership.forkserver.client",
        "membership.forkserver.server",
        "membership.channel.fault_report",
        "membership.channel.exit_report",
        "membership.__main__",
        "system.reaper",
    )
    modules = ", ".join(f"lightning_ckptless.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
