"""Where the rivals are installed, and how their jobs are started from there."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.job import JobOptions
from benchmarks.kills import EVERY, Opponent
from benchmarks.machine import ROOT

USUAL = ROOT / ".venv-rivals" / "bin" / "python"
NVRX = f"nvidia-resiliency-ext in process, ddp + ModelCheckpoint({EVERY})"
TORCHFT, TORCHFT_AS_IT_IS = "torchft, its hook mended", "torchft as it is"
PACKAGES = ("nvidia-resiliency-ext", "torchft", "lightning", "torch")
_ASK = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


class RivalsMissingError(RuntimeError):
    """The environment is not there, or something is not installed in it."""


def with_supervisor(options: JobOptions, *, python: Path) -> list[str]:
    """The command line of a rival's job."""
    return [str(python), "-m", "benchmarks.rivals.supervisor", *options.to_arguments()]


def rivals(python: Path, ranks: int, every: int) -> tuple[Opponent, ...]:
    """The jobs of the two, each in its best configuration, and torchft without our mending.

    Args:
        python: of the environment that they are installed in.
        ranks: of a job.
        every: steps between two kills, at least, where there is no checkpoint file.
    """
    command = partial(with_supervisor, python=python)
    # Nothing of ours is loaded there, and what the rivals' own polling makes torch say is not written down.
    env = (("TORCH_DEVICE_BACKEND_AUTOLOAD", "0"), ("TORCH_CPP_LOG_LEVEL", "ERROR"))
    as_it_is = {"mended": False}
    return (
        Opponent(NVRX, command, "nvrx", EVERY, env, ranks, kills_of_a_job=1),
        Opponent(TORCHFT, command, "torchft", env=env, ranks=ranks, every=every),
        Opponent(TORCHFT_AS_IT_IS, command, "torchft", env=env, ranks=ranks, every=every, strategy_options=as_it_is),
    )


def versions(python: Path) -> dict[str, str]:
    """What is installed in the rivals' environment, by package.

    Raises:
        RivalsMissingError: there is no such environment, or it lacks one of `PACKAGES`.
    """
    if not python.exists():
        raise RivalsMissingError(f"{python} is not there: `make bench-rivals` sets it up")
    asked = subprocess.run([python, "-c", _ASK, *PACKAGES], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = asked.stderr.strip().rpartition("\n")[2]
        raise RivalsMissingError(f"{python} lacks a package ({last}): `make bench-rivals` sets it up")
    found: dict[str, str] = json.loads(asked.stdout)
    return found
