"""The environment of the rivals, and the command lines that start their jobs in it."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.harness.machine import ROOT
from benchmarks.harness.scenario import CHECKPOINT_EVERY, Scenario
from benchmarks.jobs.job import JobOptions

DEFAULT_PYTHON = ROOT / ".venv-rivals" / "bin" / "python"
NVRX = f"nvidia-resiliency-ext in process, ddp + ModelCheckpoint({CHECKPOINT_EVERY})"
TORCHFT = "torchft, with its gradient hook patched"
PACKAGES = ("nvidia-resiliency-ext", "torchft", "lightning", "torch")
_ASK = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


class RivalsMissingError(RuntimeError):
    """The environment does not exist, or lacks a package."""


def with_supervisor(options: JobOptions, *, python: Path) -> list[str]:
    """Return the command line of a rival's job."""
    return [str(python), "-m", "benchmarks.rivals.supervisor", *options.to_arguments()]


def rivals(python: Path, ranks: int, every: int) -> tuple[Scenario, ...]:
    """Return the jobs of both rivals in their best configuration."""
    command = partial(with_supervisor, python=python)
    # Do not load this package there, and suppress the messages that the rivals' polling triggers in torch.
    env = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    nvrx = JobOptions(strategy="nvrx", checkpoint_every=CHECKPOINT_EVERY, devices=ranks)
    torchft = JobOptions(strategy="torchft", devices=ranks)
    return (
        Scenario(NVRX, command, nvrx, env, kills_of_a_job=1),
        Scenario(TORCHFT, command, torchft, env, every),
    )


def versions(python: Path) -> dict[str, str]:
    """Return the versions in the rivals' environment, by package.

    Raises:
        RivalsMissingError: If the environment does not exist, or lacks one of `PACKAGES`.
    """
    if not python.exists():
        raise RivalsMissingError(f"{python} does not exist: `make bench-rivals` sets it up")
    asked = subprocess.run([python, "-c", _ASK, *PACKAGES], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = asked.stderr.strip().rpartition("\n")[2]
        raise RivalsMissingError(f"{python} lacks a package ({last}): `make bench-rivals` sets it up")
    found: dict[str, str] = json.loads(asked.stdout)
    return found
