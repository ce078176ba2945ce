"""The layout of the values of this package in TensorBoard, on its page *Custom scalars*.

Apart from `report`, which logs the values, because it concerns one kind of logger only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.protocol.phases import PHASE_FIELDS
from lightning_ckptless.protocol.time_account import Bucket

CHARTS = {
    "goodput": ("goodput", "goodput_1h"),
    "time by bucket, seconds": tuple(f"time_{bucket}_s" for bucket in Bucket),
    "recoveries, rewinds and replayed steps": ("recoveries", "rewinds", "steps_replayed"),
    "time between failures, seconds": ("mtbf_s", "mtbf_low_s", "mtbf_high_s"),
    "last recovery by phase, seconds": tuple(f"recovery_{name}" for name in PHASE_FIELDS),
    "last recovery, seconds": ("recovery_s",),
    "mirroring, milliseconds": ("mirror_ms", "mirror_stall_ms", "mirror_submit_ms"),
    "skipped versions": ("mirror_skipped",),
    "bytes per version": ("mirrored_bytes",),
}
"""The values that share a chart, by its title."""


def lay_out(loggers: Iterable[Any], prefix: str) -> None:
    """Write the layout to the loggers for TensorBoard.

    Args:
        loggers: loggers of the trainer.
        prefix: prefix of the names of all values.
    """
    charts = {title: ["Multiline", [f"^{prefix}{name}$" for name in names]] for title, names in CHARTS.items()}
    for logger in loggers:
        if is_a(logger, "loggers", "TensorBoardLogger"):
            logger.experiment.add_custom_scalars({prefix.rstrip("/"): charts})
