"""Projects from the package index that train with Lightning, and what is expected of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Project:
    """One row: a project and the program that trains with it.

    Args:
        distributions: what is installed for it; the first gives the row its name.
        program: file in `programs/`, without its ending.
        does: what the program uses of the project.
        faults: what the fault injector does to the second run.
        killed_from: optimizer step from which a rank is killed from outside.
        victim: that rank.
        ddp: Lightning's strategy that it is compared with.
        refused: part of the reason for which it is refused before the first step; None where it must be identical.
        note: what a program that uses the project must do or avoid.
    """

    distributions: tuple[str, ...]
    program: str
    does: str
    faults: str = "kill:rank=1:step=4,kill:rank=0:step=9"
    killed_from: int = 6
    victim: int = 0
    ddp: str = "ddp"
    refused: str | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """Its name in the package index."""
        return self.distributions[0]

    @property
    def path(self) -> Path:
        """The program's file."""
        return PROGRAMS / f"{self.program}.py"

    def versions(self) -> str | None:
        """Names and versions of what is installed; None where something is missing."""
        try:
            return ", ".join(f"{name} {version(name)}" for name in self.distributions)
        except PackageNotFoundError:
            return None


PROJECTS = (
    Project(
        ("pytorch-forecasting",),
        "forecasting_tft",
        "temporal fusion transformer, checkpoints, early stopping",
    ),
    Project(
        ("darts",),
        "darts_nbeats",
        "N-BEATS, early stopping, checkpoints and rows by Lightning",
        note="leave `save_checkpoints` and `log_tensorboard` off: with them and `force_reset=True` a new process "
        "deletes the rows that were written, without `force_reset` it refuses to start",
    ),
    Project(
        ("neuralforecast",),
        "neuralforecast_nhits",
        "NHITS, early stopping by steps",
    ),
    Project(
        ("gluonts",),
        "gluonts_deepar",
        "DeepAR on random windows, drawn before training",
        note="draw the windows before training: as it comes, gluonts takes them from a stream that cannot be wound "
        "back, of which a line before the first step warns",
    ),
    Project(
        ("scvi-tools",),
        "scvi_vae",
        "variational autoencoder with its own sampler, logger and `SaveCheckpoint`",
        ddp="ddp_find_unused_parameters_true",
        note="pass the strategy as an object or as `ckptless_ddp`: scvi-tools looks for `ddp` in the name",
    ),
    Project(
        ("chemprop",),
        "chemprop_mpnn",
        "message passing on molecules, metrics, checkpoints",
    ),
    Project(
        ("lightly",),
        "lightly_moco",
        "MoCo with a memory bank, augmentation in two dataloader workers",
    ),
    Project(
        ("peft", "transformers"),
        "peft_lora",
        "LoRA on a tiny BERT, accumulated gradients, partial checkpoints",
    ),
    Project(
        ("timm",),
        "timm_resnet",
        "ResNet with stochastic depth, mixup, LAMB, EMA and timm's scheduler",
    ),
    Project(
        ("segmentation-models-pytorch", "timm"),
        "segmentation_unet",
        "U-Net, statistics of an epoch kept in lists of the module",
    ),
    Project(
        ("torchgeo",),
        "torchgeo_task",
        "its classification task, data module and metrics, augmentation by kornia",
    ),
)
