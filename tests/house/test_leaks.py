"""Leaks of tests are detected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.arena_space import default_arena_dir
from tests import leaks
from tests.leaks import Snapshot, find_leaks

SLEEPER = "import signal; print('there', flush=True); signal.pause()"


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    monkeypatch.setattr(leaks, "GRACE_S", 0.05)
    return Snapshot.take()


def test_an_unchanged_process_has_no_leaks(before: Snapshot) -> None:
    assert find_leaks(before) == []


def test_a_running_thread_is_reported(before: Snapshot) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-alone")
    thread.start()
    assert find_leaks(before) == ["thread left-alone"]
    end.set()
    thread.join()
    assert find_leaks(before) == []


def test_a_child_process_is_reported_and_killed(before: Snapshot) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL) as process:
        (found,) = find_leaks(before)
        assert found.startswith(f"process {process.pid}: ")
    assert process.returncode == -signal.SIGKILL


def test_a_process_whose_parent_has_exited_is_reported(before: Snapshot) -> None:
    child = f"subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=-3, stderr=-3)"
    start = f"import subprocess, sys; print({child}.pid)"
    pid = int(subprocess.run([sys.executable, "-c", start], capture_output=True, check=True).stdout)
    (found,) = find_leaks(before)
    assert found.startswith(f"process {pid}: ")


def test_an_open_file_is_reported(before: Snapshot, tmp_path: Path) -> None:
    number = os.open(tmp_path / "file", os.O_CREAT)
    assert find_leaks(before) == [f"file {number} -> {tmp_path / 'file'}"]
    os.close(number)
    assert find_leaks(before) == []


def test_an_arena_is_reported(before: Snapshot, tmp_path: Path) -> None:
    arena = Arena.create(default_arena_dir(), f"leaks-{os.getpid()}", "node", Owner.of(os.getpid()))
    found = find_leaks(before)
    arena.remove()
    arena.close()
    assert found == [f"shared memory {arena.path.name}"]
    assert find_leaks(before) == []


def test_arenas_of_other_runs_are_ignored(before: Snapshot) -> None:
    with tempfile.TemporaryDirectory(dir=leaks.SHARED_MEMORY) as folder:
        Arena.create(Path(folder), "another", "node", Owner.of(os.getpid())).close()
        assert find_leaks(before) == []


def test_changed_settings_are_reported_and_restored(before: Snapshot) -> None:
    os.environ["LEFT_SET"] = "1"
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert find_leaks(before) == ["environment variable LEFT_SET", "handler of SIGUSR1"]
    assert find_leaks(before) == []


def test_a_new_file_in_the_repository_is_reported(before: Snapshot) -> None:
    # A unique name, as a run started by hand may have left its logs.
    folder = Path(tempfile.mkdtemp(prefix="left-", dir=leaks.REPOSITORY))
    found = find_leaks(before)
    folder.rmdir()
    assert found == [f"{folder.name} in the repository"]
