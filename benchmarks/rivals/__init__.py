"""Jobs of other fault-tolerance tools: NVIDIA's resiliency extension and torchft, with the same model and data.

`nvrx`, `torchft` and `supervisor`, which starts their processes, run in a separate environment, `.venv-rivals`, and
import nothing of this package. This module runs in the benchmark itself.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.jobs.job import JobOptions

PYTHON = Path(__file__).parents[2] / ".venv-rivals" / "bin" / "python"
VARIABLES = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Do not load this package there, and suppress the messages that the rivals' polling triggers in torch."""
PACKAGES = ("nvidia-resiliency-ext", "torchft", "lightning", "torch")
_ASK = "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"


def command(options: JobOptions, *, python: Path) -> list[str]:
    """Return the command line of a rival's job."""
    return [str(python), "-m", "benchmarks.rivals.supervisor", *options.to_arguments()]


def versions(python: Path) -> dict[str, str]:
    """Return the versions of `PACKAGES` in the rivals' environment; nothing, and a message, if one is missing."""
    problem = "does not exist"
    if python.exists():
        asked = subprocess.run([python, "-c", _ASK, *PACKAGES], capture_output=True, text=True, check=False)
        if not asked.returncode:
            found: dict[str, str] = json.loads(asked.stdout)
            return found
        problem = f"lacks a package ({asked.stderr.strip().rpartition(chr(10))[2]})"
    print(f"torchft and nvidia-resiliency-ext are not measured: {python} {problem}: `make bench-rivals` sets it up")
    return {}
