"""What `ckptless export` says where there is nothing to export, or no place for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.durable.capture import Captured
from lightning_ckptless.durable.folder import DurableFolder, Manifest, write_manifest
from lightning_ckptless.durable.store import write_state
from lightning_ckptless.errors import CkptlessError, DurableError, OptionsError
from tests.cli.ledgers import RUN_ID, write_ledger
from tests.durable.conftest import captured, manifest_of, world

__all__ = ["captured", "world"]


def export(*words: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    if isinstance(result.exception, CkptlessError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def durable(captured: Captured, tmp_path: Path) -> Path:
    """A folder with one durable state, of step 3."""
    folder = DurableFolder(tmp_path / "durable")
    folder.prepare()
    part = folder.begin(captured.snapshot.version)
    write_state(captured, part)
    write_manifest(part, manifest_of(captured))
    folder.complete(part, captured.snapshot.version)
    return folder.path


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"neither the folder of a run .* nor one of durable states"):
        export(tmp_path)


def test_a_run_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="nonsense: no ledger of it"):
        export("nonsense", "--run-root", tmp_path)


def test_a_run_that_has_left_nothing(tmp_path: Path) -> None:
    write_ledger(tmp_path, arena=tmp_path / "shm" / "gone")
    (tmp_path / "shm").mkdir()
    with pytest.raises(DurableError, match="its arenas are gone, and it has written no durable state"):
        export(RUN_ID, "--run-root", tmp_path)


@pytest.mark.parametrize("step", ["soon", "-1", "1.5"])
def test_a_step_that_is_no_number(step: str, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="expected a number or 'latest'"):
        export(tmp_path, f"--step={step}")


def test_a_step_that_is_not_there(durable: Path) -> None:
    with pytest.raises(OptionsError, match=r"step 7 is not there .*; there are: step 3"):
        export(durable, "--step", 7)


def test_what_is_there_is_overwritten_only_by_force(durable: Path, tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.mkdir()
    (target / "mine").write_text("")
    with pytest.raises(OptionsError, match="is there already: name another file, or give --force"):
        export(durable, "-o", target, "--format", "dcp")
    assert (target / "mine").exists()
    assert f"{target}: step 3 of run run" in export(durable, "-o", target, "--format", "dcp", "--force")
    assert not (target / "mine").exists() and Manifest.read(target).snapshot.version.optimizer_step == 3


def test_a_folder_that_is_not_there(durable: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="there is no folder"):
        export(durable, "-o", tmp_path / "no" / "file.ckpt")


def test_one_state_may_be_named_itself(durable: Path, tmp_path: Path) -> None:
    (state,) = durable.glob("step-*")
    assert "step 3" in export(state, "-o", tmp_path / "again", "--format", "dcp")
    assert "step 3" in export(tmp_path / "again", "-o", tmp_path / "third", "--format", "dcp")


def test_a_state_without_a_recipe_makes_no_checkpoint(durable: Path, tmp_path: Path) -> None:
    with pytest.raises(DurableError, match="the run has not said how a checkpoint is put together"):
        export(durable, "-o", tmp_path / "model.ckpt")
    assert not list(tmp_path.glob("*model.ckpt*")) and not list(tmp_path.glob(".model*"))


def test_a_damaged_state(durable: Path, tmp_path: Path) -> None:
    (shard,) = durable.rglob("__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DurableError, match="shard 0 is damaged"):
        export(durable, "-o", tmp_path / "state", "--format", "dcp")
