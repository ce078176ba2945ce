"""A run is found by id, by folder, or as the newest one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME, Ledger


def make_run(root: Path, name: str, written_at: float) -> Path:
    Ledger(root / name / LEDGER_NAME).record("run_started", generation=1, arena=f"/shm/{name}")
    os.utime(root / name / LEDGER_NAME, (written_at, written_at))
    return root / name


def test_a_run_is_found_by_id_by_folder_and_as_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = make_run(tmp_path / "ckptless", "b", 100.0), make_run(tmp_path / "ckptless", "a", 200.0)
    monkeypatch.chdir(tmp_path)
    assert find_run("b", None).folder == older
    assert find_run(str(older), Path("elsewhere")).run_id == "b"
    assert find_run(None, None).folder == newer
    assert find_run(None, None).arena_dir == Path("/shm")
    monkeypatch.chdir(older)
    assert find_run(".", None).run_id == "b"


def test_the_root_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "a", 100.0)
    monkeypatch.setenv(environment.RUN_ROOT, str(tmp_path))
    assert find_run(None, None).run_id == "a"


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 100.0)
    with pytest.raises(OptionsError, match=r"nonsense: no ledger.jsonl found in .*; runs there: a"):
        find_run("nonsense", tmp_path)
    with pytest.raises(OptionsError, match=r"the newest run: .* runs there: none"):
        find_run(None, tmp_path / "empty")
