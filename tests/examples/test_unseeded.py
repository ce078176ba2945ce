"""The drill reports a script whose results vary between runs without faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.errors import LaunchError
from tests.examples.conftest import EXAMPLES, Drill


def test_an_unseeded_script_is_reported(drill: Drill, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    text = (EXAMPLES / "char_gpt" / "train.py").read_text()
    script.write_text(text.replace("    seed_everything(1, workers=True)\n", ""))
    sizes = ("--steps", "6", "--layers", "1", "--width", "32", "--context", "32", "--batch-size", "4")
    report = drill((str(script), *sizes), "kill:rank=1:step=3")
    assert not report.identical
    assert report.differs_before_faults
    assert "parameter token_embedding.weight" in report.unrepeatable, report.unrepeatable
    assert any("seed_everything(1, workers=True)" in problem for problem in report.problems)


def test_a_script_that_fails_without_a_fault_is_reported(drill: Drill, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('out of paper')")
    with pytest.raises(LaunchError, match=r"exit code 1 without any fault(.|\n)*out of paper"):
        drill((str(script),), "kill:rank=1:step=3")
