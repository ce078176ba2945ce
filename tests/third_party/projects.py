"""Projects from the package index that train with Lightning, and the expected results."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Project:
    """A project and the program that trains with it: one row of the table.

    Args:
        distributions: required distributions; the first one names the row.
        program: file in `programs/`, without suffix.
        does: the features of the project that the program uses.
        faults: fault script of the run with injected kills.
        killed_from: optimizer step from which a rank is killed from outside.
        victim: that rank.
        ddp: Lightning's strategy to compare with.
        refused: part of the reason for which the run is refused before the first step; None if it must be identical.
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
        """The name in the package index."""
        return self.distributions[0]

    @property
    def path(self) -> Path:
        """The file of the program."""
        return PROGRAMS / f"{self.program}.py"

    def versions(self) -> str | None:
        """Return names and versions of the distributions; None if one is not installed."""
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
        note="leave `save_checkpoints` and `log_tensorboard` off: with them a new process deletes the rows written so "
        "far (`force_reset=True`) or refuses to start (without it)",
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
        note="draw the windows before training: by default gluonts takes them from a stream that cannot be rewound, "
        "and a line before the first step warns of it",
    ),
    Project(
        ("scvi-tools",),
        "scvi_vae",
        "variational autoencoder with its own sampler, logger and `SaveCheckpoint`",
        ddp="ddp_find_unused_parameters_true",
        note="pass the strategy as an object or as `ckptless_ddp`, since scvi-tools looks for `ddp` in the name",
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
