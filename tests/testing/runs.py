"""The lab's run in this process, on one device, with callbacks to try."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.lab.parts import Options, make_run

BASE = Options(devices=1, samples=24, epochs=2)
"""Six steps an epoch, twelve in all."""


def fit(options: Options, root: Path, *callbacks: Any) -> tuple[Any, Any]:
    """Run to the end, or to the exception of a callback; returns trainer and model."""
    trainer, model, data = make_run(replace(options, root=str(root)), SingleDeviceStrategy(device="cpu"), callbacks)
    trainer.fit(model, datamodule=data)
    return trainer, model
