"""The distribution of Lightning that a script imports is the one that is preloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.distributions import LIGHTNING, PYTORCH_LIGHTNING
from lightning_ckptless.membership.launch.config import distribution_of, usual_modules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import lightning as L", LIGHTNING),
        ("from lightning.pytorch import Trainer", LIGHTNING),
        ("import pytorch_lightning as pl", PYTORCH_LIGHTNING),
        ("if True:\n    from pytorch_lightning import Trainer", PYTORCH_LIGHTNING),
        ("import pytorch_lightning\nimport lightning", LIGHTNING),
        ("import torch  # not pytorch_lightning", LIGHTNING),
    ],
)
def test_the_script_determines_the_distribution(text: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(text)
    assert distribution_of(["--nnodes", "1", str(script), "--x"], {}) == expected


def test_the_environment_takes_precedence_over_the_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import lightning")
    assert distribution_of([str(script)], {environment.LIGHTNING: PYTORCH_LIGHTNING}) == PYTORCH_LIGHTNING


def test_a_module_or_a_missing_file_gives_the_default() -> None:
    assert distribution_of(["-m", "project.train"], {}) == LIGHTNING
    assert distribution_of(["missing.py"], {}) == LIGHTNING


def test_only_one_distribution_is_preloaded(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import pytorch_lightning")
    modules = usual_modules([str(script)])
    assert PYTORCH_LIGHTNING in modules
    assert LIGHTNING not in modules
