"""`ckptless clean` removes the arenas of dead agents and keeps those of live ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lightning_ckptless.cli.app import app
from lightning_ckptless.membership.agent.scratch import ScratchFolder
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.arena_notes import ArenaNotes

DEAD = Owner(pid=2**22 - 1, started_at=1.0)


def make(folder: Path, run_id: str, owner: Owner = DEAD) -> Path:
    arena = Arena.create(folder, run_id, "node", owner)
    arena.write_notes(ArenaNotes(finished=True))
    arena.close()
    return arena.path


def clean(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["clean", "--arena-dir", str(folder), *more])


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    (folder := tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def alive(tmp_path: Path) -> Path:
    """An arena whose agent is this process."""
    return make(tmp_path, "alive", Owner.of(os.getpid()))


def test_all_arenas_of_dead_agents_are_removed(tmp_path: Path, alive: Path) -> None:
    dead = [make(tmp_path, "one"), make(tmp_path, "two")]
    result = clean(tmp_path)
    assert result.exit_code == 0
    assert alive.is_dir() and f"kept {alive}: its agent is alive" in result.output
    assert not any(path.exists() for path in dead)
    assert result.output.count("removed") == 2


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    dead = make(tmp_path, "one")
    assert f"would remove {dead}" in clean(tmp_path, "--dry-run").output
    assert dead.is_dir()


def test_only_the_given_run_is_removed(tmp_path: Path) -> None:
    other, mine, second_fit = make(tmp_path, "other"), make(tmp_path, "mine"), make(tmp_path, "mine.1")
    assert clean(tmp_path, "mine").exit_code == 0
    assert other.is_dir() and not mine.exists() and not second_fit.exists()


def test_a_live_run_is_refused(tmp_path: Path, alive: Path) -> None:
    result = clean(tmp_path, "alive")
    assert result.exit_code == 1
    assert alive.is_dir()


def test_an_arena_in_another_format_is_removed(tmp_path: Path) -> None:
    old, live = make(tmp_path, "old"), make(tmp_path, "live", Owner.of(os.getpid()))
    for path in (old, live):
        facts = json.loads((path / "arena.json").read_text())
        (path / "arena.json").write_text(json.dumps({**facts, "format": 999}))
    assert clean(tmp_path).exit_code == 0
    assert live.is_dir() and not old.exists()


def test_a_group_writable_arena_is_removed(tmp_path: Path) -> None:
    (dead := make(tmp_path, "one")).chmod(0o770)
    assert clean(tmp_path).exit_code == 0 and not dead.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"owner": {"pid": -7, "started_at": 1}}', None])
def test_a_damaged_arena_is_removed(tmp_path: Path, content: bytes | None) -> None:
    path = make(tmp_path, "spoilt")
    (path / "shard-0000.held-by-0000.ab.slot-0").touch()
    if content is None:
        (path / "arena.json").unlink()
    else:
        (path / "arena.json").write_bytes(content)
    assert clean(tmp_path).exit_code == 0
    assert not path.exists()


def test_a_folder_that_is_not_an_arena_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "ckptless-other"
    folder.mkdir()
    assert clean(tmp_path).output == f"no arenas in {tmp_path}\n"
    assert folder.is_dir()


def test_temporary_folders_of_killed_agents_are_removed(tmp_path: Path, temporary: Path) -> None:
    (left := temporary / "ckptless-scratch-logs-1").mkdir()
    (left / "file").touch()
    with ScratchFolder("logs") as held:
        assert f"would remove {left}" in clean(tmp_path, "--dry-run").output
        assert "removed" not in clean(tmp_path, "one-run").output and left.exists()
        result = clean(tmp_path)
        assert f"removed {left}: temporary files of a killed agent" in result.output
        assert list(temporary.iterdir()) == [held.path]
        assert "no arenas in" in clean(tmp_path).output
