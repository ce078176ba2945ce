"""Runs the lab's training in this process, on one device, with the callbacks under test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.lab.parts import Options, make_run

BASE = Options(devices=1, samples=24, epochs=2)
"""Six steps per epoch, twelve in total."""


def fit(options: Options, root: Path, *callbacks: Any) -> tuple[Any, Any]:
    """Run to the end or until a callback raises; returns trainer and model."""
    trainer, model, data = make_run(replace(options, root=str(root)), SingleDeviceStrategy(device="cpu"), callbacks)
    trainer.fit(model, datamodule=data)
    return trainer, model
