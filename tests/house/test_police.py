"""The police of the suite sees what it is there for."""

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
from tests import police
from tests.police import Scene, leaks

SLEEPER = "import signal; print('there', flush=True); signal.pause()"


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(police, "GRACE_S", 0.05)
    return Scene.now()


def test_nothing(before: Scene) -> None:
    assert leaks(before) == []


def test_a_thread(before: Scene) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-alone")
    thread.start()
    assert leaks(before) == ["thread left-alone"]
    end.set()
    thread.join()
    assert leaks(before) == []


def test_a_process(before: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL) as process:
        (found,) = leaks(before)
        assert found.startswith(f"process {process.pid}: ")
    assert process.returncode == -signal.SIGKILL


def test_a_process_whose_parent_is_gone(before: Scene) -> None:
    child = f"subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=-3, stderr=-3)"
    start = f"import subprocess, sys; print({child}.pid)"
    pid = int(subprocess.run([sys.executable, "-c", start], capture_output=True, check=True).stdout)
    (found,) = leaks(before)
    assert found.startswith(f"process {pid}: ")


def test_a_file(before: Scene, tmp_path: Path) -> None:
    number = os.open(tmp_path / "file", os.O_CREAT)
    assert leaks(before) == [f"file {number} -> {tmp_path / 'file'}"]
    os.close(number)
    assert leaks(before) == []


def test_an_arena(before: Scene, tmp_path: Path) -> None:
    arena = Arena.create(default_arena_dir(), f"police-{os.getpid()}", "node", Owner.of(os.getpid()))
    found = leaks(before)
    arena.remove()
    arena.close()
    assert found == [f"shared memory {arena.path.name}"]
    assert leaks(before) == []


def test_arenas_of_other_runs_are_not_looked_at(before: Scene) -> None:
    with tempfile.TemporaryDirectory(dir=police.SHARED_MEMORY) as folder:
        Arena.create(Path(folder), "another", "node", Owner.of(os.getpid())).close()
        assert leaks(before) == []


def test_settings(before: Scene) -> None:
    os.environ["LEFT_SET"] = "1"
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert leaks(before) == ["environment variable LEFT_SET", "handler of SIGUSR1"]
    assert leaks(before) == []


def test_something_in_the_repository(before: Scene) -> None:
    # Of a name that nobody has: a run that was tried by hand may have left its logs.
    folder = Path(tempfile.mkdtemp(prefix="left-", dir=police.REPOSITORY))
    found = leaks(before)
    folder.rmdir()
    assert found == [f"{folder.name} in the repository"]
