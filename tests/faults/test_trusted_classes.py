"""Callback state with classes of its own: refused if versions leave the memory of the node, unless trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ckptless import environment

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
import lightning_ckptless
from schedule import Phase

class Phases(pl.Callback):
    phase = Phase(0)
    def state_dict(self):
        return {"phase": self.phase}
    def load_state_dict(self, state):
        self.phase = state["phase"]
    def on_train_batch_end(self, trainer, *_):
        self.phase = Phase(self.phase.number + 1)

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

if __name__ == "__main__":
    trusted = sys.argv[1:]
    phases = Phases()
    pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        strategy=lightning_ckptless.CkptlessStrategy(durable_every_n_steps=1, trusted_classes=trusted),
        callbacks=[phases],
    ).fit(Model(), DataLoader(TensorDataset(torch.randn(64, 8)), 4))
    sys.stdout.write(f"phase {phases.phase.number}\\n")
"""
SCHEDULE = """
class Phase:
    def __init__(self, number):
        self.number = number
"""


def run(folder: Path, *arguments: str, faults: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    (folder / "schedule.py").write_text(SCHEDULE)
    command = [sys.executable, "-m", "lightning_ckptless.runner", "--nproc-per-node", "2", "train.py", *arguments]
    env = {**os.environ, environment.FAULTS: faults}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_untrusted_class_is_refused_at_the_first_version(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "callbacks.0.state.phase" in done.stderr
    assert "trusted_classes=['schedule.Phase']" in done.stderr
    assert "phase" not in done.stdout


@pytest.mark.slow
def test_a_trusted_class_is_rolled_back_with_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "schedule.Phase", faults="kill:rank=0:step=3,kill:rank=1:step=6")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("recovered in place") == 2
    assert done.stdout.count("phase 8") == 2
