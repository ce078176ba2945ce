"""Terminal output while ranks are replaced."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.ledger import read_ledger

SCRIPT = """
import logging
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

print("head of the script", flush=True)

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 8:
            # Warn in the same way as the package.
            logging.getLogger("lightning_ckptless.trainer.data.loader").warning("ckptless: a warning in training")
        return self.layer(batch[0]).pow(2).mean()
    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

if __name__ == "__main__":
    pl.seed_everything(1)
    data = DataLoader(TensorDataset(torch.randn(80, 8)), 4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ckptless", max_epochs=1, logger=False, enable_checkpointing=False,
        callbacks=[getattr(pl.callbacks, sys.argv[1])()],
    )
    trainer.fit(Model(), data, data)
"""
ON_ITS_OWN_LINE = re.compile(r"(^|\n|\r(\x1b\[2?K| +\r))(\x1b\[[0-9;?]*[a-zA-Z])*$")


def run_in_terminal(command: list[str], folder: Path, faults: str) -> str:
    """Run a command in a pseudo-terminal and return its output."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (200, 160))
    env = {**os.environ, environment.FAULTS: faults, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:
            pass  # EIO: the last process has closed the terminal.
        finally:
            os.close(ours)
    text = written.decode(errors="replace").replace("\r\n", "\n")
    assert process.returncode == 0, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["TQDMProgressBar", pytest.param("RichProgressBar", marks=pytest.mark.long)])
def test_kills_of_both_ranks_with_a_progress_bar(bar: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "lightning_ckptless.runner", "--nproc-per-node", "2", "train.py", bar]
    text = run_in_terminal(command, tmp_path, "kill:rank=0:step=4,kill:rank=1:step=7")
    messages = [match.start() for match in re.finditer("ckptless: ", text)]
    assert len(messages) >= 2 + 2 * 2
    assert text.count("ckptless: a warning in training") >= 2
    (ledger,) = (tmp_path / "ckptless").glob("*/ledger.jsonl")
    recorded = [e.rank for e in read_ledger(ledger, only="warning") if e.fields["text"] == "a warning in training"]
    assert set(recorded) == {0, 1}
    for start in messages:
        assert ON_ITS_OWN_LINE.search(text[max(0, start - 300) : start]), text[max(0, start - 300) : start + 60]
    # Replacements run the script from the beginning, too; until they join, their output goes to files.
    assert text.count("head of the script") == 2
    kept = list((tmp_path / "ckptless").glob("*/replacements/rank*.log"))
    assert {path.name[:5] for path in kept} == {"rank0", "rank1"}
    assert all("head of the script" in path.read_text() for path in kept)
    # The progress bar of the new rank 0 shows the epoch, its length and the current position.
    after = text[text.index("ckptless: rank 0 (pid") :]
    assert re.search(r"Epoch 0[^\r\n]* 3/10", after)
    assert not re.search(r"Epoch 0[^\r\n]*/\?", after)
