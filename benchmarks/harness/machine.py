"""The context of a measurement: hardware, versions, date and the machine's other load."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[2]


def facts() -> dict[str, Any]:
    """Return machine, versions and date as values for JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "shared_memory_gib": round(psutil.disk_usage("/dev/shm").total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "lightning_ckptless": version("lightning_ckptless"),
        "commit": _commit(),
    }


def describe(known: dict[str, Any]) -> str:
    """Return one sentence to print above the tables."""
    device = f", one {known['device']}" if known.get("device") else ""
    return (
        f"{known['date']}; {known['cores']} cores of {known['cpu']}, {known['memory_gib']} GiB{device}; "
        f"Python {known['python']}, torch {known['torch']}, lightning {known['lightning']}, commit {known['commit']}"
    )


def load() -> list[float]:
    """Return the load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def wait_until_quiet(most: float, patience_s: float) -> bool:
    """Wait until the load of the last minute is at most `most`. Returns False if `patience_s` has passed."""
    deadline = time.monotonic() + patience_s
    while os.getloadavg()[0] > most:
        if time.monotonic() > deadline:
            return False
        time.sleep(5.0)
    return True


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the working tree, with a plus sign if the tree was modified."""
    words = ["git", "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
