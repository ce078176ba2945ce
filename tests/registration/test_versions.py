"""Versions that are too old or untested, in new interpreters with forged package metadata."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless import environment
from tests.registration.conftest import Run

Claim = Callable[[str, str], Path]
MESSAGE = 'found torch 2.7.1, but lightning_ckptless requires torch >= 2.8: pip install "torch>=2.8"'
REFUSED = """
from lightning_ckptless.errors import VersionError
def refused(action):
    try:
        action()
    except VersionError as error:
        return str(error)
"""
TRAIN = """
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
trainer = Trainer(
    strategy="ckptless", accelerator="cpu", devices=2, max_steps=1, limit_val_batches=0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(BoringModel())
"""


@pytest.fixture
def claim(tmp_path: Path) -> Claim:
    """Return a function that creates a folder with metadata of another version of a package."""

    def make(name: str, version: str) -> Path:
        info = tmp_path / "claims" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        return info.parent

    return make


@pytest.mark.slow
def test_an_old_torch_is_refused_on_import(run: Run, site: Path, claim: Claim) -> None:
    result = run(
        """
try:
    import lightning_ckptless
except ImportError as error:
    emit([type(error).__name__, str(error)])
""",
        claim("torch", "2.7.1"),
        site,
    )
    assert result == ["VersionError", MESSAGE]


@pytest.mark.slow
def test_a_refused_version_does_not_affect_torch(run: Run, site: Path, claim: Claim) -> None:
    result = run(
        f"""
import torch
from lightning.pytorch import Trainer
{REFUSED}
import lightning_ckptless
emit([
    torch.ones(2).sum().item(),
    refused(lambda: Trainer(strategy="ckptless", accelerator="cpu", devices=2)),
    refused(lambda: lightning_ckptless.CkptlessStrategy),
])
""",
        claim("torch", "2.7.1"),
        site,
    )
    assert result == [2.0, MESSAGE, MESSAGE]


@pytest.mark.slow
@pytest.mark.parametrize("silenced", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_newer_torch_produces_one_warning_for_all_processes(
    site: Path, tmp_path: Path, claim: Claim, silenced: bool
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(claim("torch", "2.99.0")), str(site)])}
    done = subprocess.run(
        [sys.executable, "train.py"],
        env=env | ({environment.UNTESTED_VERSIONS: "1"} if silenced else {}),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has not been tested with torch 2.99.0") == (0 if silenced else 1)
