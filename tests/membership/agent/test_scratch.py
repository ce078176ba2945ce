"""Temporary folders of agents: removed with the agent, and found after it was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ckptless.membership.agent.scratch import ScratchFolder, find_abandoned, remove_abandoned
from tests.membership.conftest import REPOSITORY
from tests.outsider import call_as_another_user, needs_another_user, open_to_all

HOLDS = """
import sys
from lightning_ckptless.membership.agent.scratch import ScratchFolder
print(ScratchFolder("logs").path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = open_to_all(tmp_path / "tmp")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_folder_is_removed_with_its_agent(temporary: Path) -> None:
    with ScratchFolder("logs") as scratch:
        (scratch.path / "file").touch()
        assert scratch.path.stat().st_mode & 0o777 == 0o700
        assert find_abandoned() == [] and not remove_abandoned(scratch.path)
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_agent_is_found(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLDS]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as agent,
        ScratchFolder("logs") as mine,
    ):
        assert agent.stdout is not None
        path = Path(agent.stdout.readline().strip())
        assert path.parent == temporary and find_abandoned() == []
        agent.kill()
        agent.wait()
        assert find_abandoned() == [path]
        assert remove_abandoned(path) and not remove_abandoned(path)
        assert [*temporary.iterdir()] == [mine.path]


@needs_another_user
def test_a_folder_of_another_user_is_left_alone(temporary: Path, tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    folder, link = temporary / "ckptless-scratch-logs-1", temporary / "ckptless-scratch-logs-2"

    def plant() -> None:
        folder.mkdir(mode=0o777)
        link.symlink_to(own)

    call_as_another_user(plant)
    assert find_abandoned() == []
    assert not remove_abandoned(folder) and not remove_abandoned(link)
    assert folder.exists() and own.exists()
