"""Training with `pytorch_lightning`, which has its own classes, by the strategy's name and by its class."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.testing.drill import run_drill
from tests.faults.conftest import REPOSITORY
from tests.faults.matrix import is_version

SCRIPT = """
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
import lightning_ckptless

pl.seed_everything(3, workers=True)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy={strategy}, max_epochs=1, limit_train_batches=8, limit_val_batches=2,
    enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, enable_checkpointing=False,
    logger=pl.loggers.CSVLogger("."),
)
trainer.fit(BoringModel())
assert any(base.__module__.startswith("pytorch_lightning") for base in type(trainer.strategy).__mro__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ['"ckptless"', pytest.param("lightning_ckptless.CkptlessStrategy()", marks=pytest.mark.long)]
)
def test_kill(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(strategy=strategy))
    env = {"PYTHONPATH": str(REPOSITORY)}
    report = run_drill([str(script)], "kill:rank=1:step=4", folder=tmp_path / "drill", isolate=True, env=env)
    assert report.problems == ()
    assert [is_version(recovery.version, "step 3") for recovery in report.recoveries] == [True]
