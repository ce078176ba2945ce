"""The script that every process of a rival's job runs; `--strategy` names the rival.

It is separate from what it imports so that the time of its first line is known before torch is imported.
"""

from __future__ import annotations

import os
import time
from importlib import import_module

from benchmarks.job import JobOptions
from benchmarks.wire import SOCKET, Wire


def main() -> None:
    """Train, and report each moment to the benchmark."""
    began_at = time.time()
    wire = Wire(os.environ[SOCKET])
    wire.send("script", at=began_at)
    options = JobOptions.from_arguments()
    rival = import_module(f"benchmarks.rivals.{options.strategy}")
    wire.send("imported")
    rival.train(options, wire)


if __name__ == "__main__":
    main()
