"""`ckptless export` refuses missing states and unusable outputs, and overwrites only with `--force`."""

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


def test_an_unrelated_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"neither a run folder .* nor a folder of durable states"):
        export(tmp_path)


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"nonsense: no ledger\.jsonl found"):
        export("nonsense", "--run-root", tmp_path)


def test_a_run_without_arenas_or_durable_states_is_refused(tmp_path: Path) -> None:
    write_ledger(tmp_path, arena=tmp_path / "shm" / "gone")
    (tmp_path / "shm").mkdir()
    with pytest.raises(DurableError, match="its arenas no longer exist, and it has written no durable state"):
        export(RUN_ID, "--run-root", tmp_path)


@pytest.mark.parametrize("step", ["soon", "-1", "1.5"])
def test_a_step_that_is_not_a_number_is_refused(step: str, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="expected a number or 'latest'"):
        export(tmp_path, f"--step={step}")


def test_an_unavailable_step_is_refused(durable: Path) -> None:
    with pytest.raises(OptionsError, match=r"step 7 is not available .*; available: step 3"):
        export(durable, "--step", 7)


def test_an_existing_output_is_overwritten_only_with_force(durable: Path, tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.mkdir()
    (target / "mine").write_text("")
    with pytest.raises(OptionsError, match="already exists: choose another name, or use --force"):
        export(durable, "-o", target, "--format", "dcp")
    assert (target / "mine").exists()
    assert f"{target}: step 3 of run run" in export(durable, "-o", target, "--format", "dcp", "--force")
    assert not (target / "mine").exists() and Manifest.read(target).snapshot.version.optimizer_step == 3


def test_a_missing_output_folder_is_refused(durable: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="does not exist"):
        export(durable, "-o", tmp_path / "no" / "file.ckpt")


def test_a_single_durable_state_can_be_exported(durable: Path, tmp_path: Path) -> None:
    (state,) = durable.glob("step-*")
    assert "step 3" in export(state, "-o", tmp_path / "again", "--format", "dcp")
    assert "step 3" in export(tmp_path / "again", "-o", tmp_path / "third", "--format", "dcp")


def test_a_state_without_a_recipe_cannot_become_a_checkpoint(durable: Path, tmp_path: Path) -> None:
    with pytest.raises(DurableError, match="the run has stored no recipe for a checkpoint"):
        export(durable, "-o", tmp_path / "model.ckpt")
    assert not list(tmp_path.glob("*model.ckpt*")) and not list(tmp_path.glob(".model*"))


def test_a_damaged_state_is_refused(durable: Path, tmp_path: Path) -> None:
    (shard,) = durable.rglob("__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DurableError, match="shard 0 is damaged"):
        export(durable, "-o", tmp_path / "state", "--format", "dcp")
