"""Only gradients that a script uses in the next step are reported as lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
import lightning_ckptless

HOW = sys.argv[1]


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2_500_000, bias=False)

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if HOW != "kept":
            optimizer.zero_grad(set_to_none=HOW != "zeroed in place")


if __name__ == "__main__":
    pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        strategy=lightning_ckptless.CkptlessStrategy(gradient_as_bucket_view=HOW == "views of buckets"),
    ).fit(Model(), DataLoader(TensorDataset(torch.ones(24, 1)), 2))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("how", ["kept", "zeroed in place", "views of buckets", "dropped"])
def test_gradients_that_are_not_used_again_are_not_reported(how: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "train.py", how], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("Model.parameters().grad was changed in training" in done.stderr) == (how == "kept")
