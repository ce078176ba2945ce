"""A run started by Hydra has one output folder, no matter when its processes start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import run_drill
from lightning_ckptless.testing.starters import Ladder, Launcher
from lightning_ckptless.testing.variant import Variant
from tests.faults.conftest import REPOSITORY

pytest.importorskip("hydra")

ENV = {"PYTHONPATH": str(REPOSITORY)}
# Unlike Hydra's own pattern, this one distinguishes processes that start within the same second.
FOLDERS = ("hydra.run.dir=outputs/${now:%f}", "hydra.sweep.dir=multirun/${now:%f}")
SCRIPT = """
import hydra, os
import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    L.seed_everything(cfg.seed, workers=True)
    out = HydraConfig.get().runtime.output_dir
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ckptless", max_epochs=2, limit_train_batches=6, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, default_root_dir=out,
        logger=L.pytorch.loggers.CSVLogger(out), callbacks=[ModelCheckpoint("kept", filename="of-{step}")],
    )
    trainer.fit(BoringModel())

main()
"""


def files_of(variant: Variant) -> set[str]:
    """Return the files of Hydra, the logger and the callback, with the time stamp of the folder replaced."""
    folders = {folder.name for kind in ("outputs", "multirun") for folder in (variant.folder / "cwd").glob(f"{kind}/*")}
    assert len(folders) == 1, folders
    (stamp,) = folders
    paths = [path for path in (variant.folder / "cwd").rglob("*") if path.is_file() and "ckptless" not in path.parts]
    return {re.sub(rf"\b{stamp}\b", "NOW", str(path.relative_to(variant.folder))) for path in paths}


@pytest.mark.parametrize(
    ("arguments", "launcher", "in_place"),
    [
        ((), "ckptless", None),
        pytest.param(("hydra.job.chdir=true",), "ckptless", False, marks=pytest.mark.long),
        pytest.param(("hydra.job.chdir=true",), "ckptless", None, marks=pytest.mark.long),
        pytest.param((), "python", None, marks=pytest.mark.long),
        pytest.param(("--multirun", "seed=1,2"), "ckptless", None, marks=pytest.mark.long),
        pytest.param(("--multirun", "seed=1,2"), "python", None, marks=pytest.mark.long),
    ],
)
def test_a_run_has_one_output_folder(
    arguments: tuple[str, ...], launcher: Launcher, in_place: bool | None, tmp_path: Path, parent: ForkServer
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    seed = () if "--multirun" in arguments else ("+seed=1",)
    command = [str(tmp_path / "train.py"), *(a.replace("seed=", "+seed=") for a in arguments), *seed, *FOLDERS]
    report = run_drill(
        command,
        "kill:rank=0:step=4",
        folder=tmp_path / "drill",
        launcher=launcher,
        parent=parent if launcher == "ckptless" else None,
        isolate=True,
        env=ENV,
        ladder=Ladder(in_place=in_place),
    )
    assert report.problems == ()
    assert (report.in_place, report.relaunches) == ((0, 1) if in_place is False else (1, 0))
    assert files_of(report.faulted) == files_of(report.baseline)
    written = {Path(path).name for path in files_of(report.faulted)}
    assert {"config.yaml", "metrics.csv", "train.log", "train_ddp_process_1.log", "of-step=12.ckpt"} <= written
