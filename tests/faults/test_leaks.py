"""After twenty recoveries, a survivor holds no more threads, files and memory than after the first ones."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.starters import Ladder, Start, start
from tests.faults.conftest import REPOSITORY

RECOVERIES = 20
EVERY = 6
SCRIPT = f"""
import os, threading
import lightning as L
import psutil
from lightning.pytorch.demos.boring_classes import BoringModel

class Census(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        # After a recovery, the old process groups are freed within a step or two.
        if trainer.global_step % {EVERY} == 3:
            process = psutil.Process()
            facts = threading.active_count(), process.num_threads(), process.num_fds(), process.memory_info().rss
            with open(f"census-{{os.getpid()}}", "a") as file:
                print(*facts, file=file)

L.seed_everything(1)
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ckptless", max_steps={EVERY * (RECOVERIES + 2)}, max_epochs=-1,
    enable_progress_bar=False, logger=False, enable_checkpointing=False, limit_val_batches=0, callbacks=[Census()],
)
trainer.fit(BoringModel())
"""


@dataclass(frozen=True)
class Census:
    """The resources of a process at one moment."""

    python_threads: int
    threads: int
    files: int
    rss_bytes: int


@pytest.mark.slow
def test_twenty_recoveries_leak_nothing(tmp_path: Path, parent: ForkServer) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    faults = ",".join(f"kill:rank=1:step={EVERY * (count + 1)}" for count in range(RECOVERIES))
    what = Start(
        command=(str(tmp_path / "train.py"),),
        env={"PYTHONPATH": str(REPOSITORY), "CKPTLESS_FAULTS": faults},
        cwd=tmp_path,
        output=tmp_path / "output",
        run_root=tmp_path / "runs",
        nproc=2,
        ladder=Ladder(RECOVERIES),
        timeout_s=120,
    )
    assert start("ckptless", what, parent) == 0
    longest = max(tmp_path.glob("census-*"), key=lambda path: path.stat().st_size)
    found = [Census(*(int(word) for word in line.split())) for line in longest.read_text().splitlines()]
    assert len(found) >= RECOVERIES
    # The first recovery imports and creates what later ones reuse. The minimum ignores groups not freed yet.
    early, late = _minimum(found[1:6]), _minimum(found[-5:])
    assert (late.python_threads, late.threads, late.files) == (early.python_threads, early.threads, early.files)
    assert late.rss_bytes <= 1.02 * early.rss_bytes


def _minimum(found: list[Census]) -> Census:
    return Census(*(min(values) for values in zip(*(astuple(census) for census in found), strict=True)))
