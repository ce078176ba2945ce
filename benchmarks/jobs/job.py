"""The script of every job, ours and other tools'; `--strategy` says what is measured.

It is separate from what it imports so that the time of its first line is known before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any

from benchmarks.harness.wire import SOCKET, Wire


@dataclass(frozen=True)
class JobOptions:
    """What a job trains, and how.

    Args:
        size: model size, a key of `gpt.WIDTHS`.
        batch: samples per rank and step.
        strategy: `ckptless` or `ddp`, or the module of another tool in `benchmarks.rivals`.
        strategy_options: options of the strategy.
        devices: number of ranks.
        nodes: number of nodes with that many ranks.
        steps: optimizer steps; -1 to train until stopped.
        checkpoint_every: steps between two checkpoint files; 0 for none.
        root: folder for the files of a run.
        turns: train only when it is this job's turn.
        async_save_every: steps between two calls of torch's `async_save`; 0 for none.
        accelerator: `cpu` or `gpu`.
        sharded: whether FSDP2 shards the model over all ranks, with the corresponding model-parallel strategy.
        census: count what the protocol of each rank sends, and time its rounds.
        profiled: profile what our strategy does in each step; needs `turns`.
        pace_s: pause in each step in seconds: several ranks can share a core, and a step does not vary.
    """

    size: str = "tiny"
    batch: int = 2
    strategy: str = "ddp"
    strategy_options: dict[str, Any] = field(default_factory=dict)
    devices: int = 2
    steps: int = -1
    checkpoint_every: int = 0
    root: str = "."
    turns: bool = False
    async_save_every: int = 0
    accelerator: str = "cpu"
    sharded: bool = False
    census: bool = False
    profiled: bool = False
    nodes: int = 1
    pace_s: float = 0.0

    def but(self, **changed: Any) -> JobOptions:
        """Return the options with some of them changed."""
        return replace(self, **changed)

    def to_arguments(self) -> list[str]:
        """Return the options as arguments of the script."""
        return [f"--{f.name.replace('_', '-')}={json.dumps(getattr(self, f.name))}" for f in fields(self)]

    @classmethod
    def from_arguments(cls, argv: list[str] | None = None) -> JobOptions:
        """Parse the options from a command line; the values are JSON."""
        parser = argparse.ArgumentParser(description=__doc__)
        for option in fields(cls):
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=json.loads, default=argparse.SUPPRESS)
        return cls(**vars(parser.parse_args(argv)))


def main() -> None:
    """Train, and report each moment to the benchmark."""
    began_at = time.time()
    wire = Wire(os.environ[SOCKET])
    wire.send("script", at=began_at)
    options = JobOptions.from_arguments()
    # These imports are measured.
    ours = options.strategy in {"ckptless", "ddp"}
    tool = import_module("benchmarks.jobs.fit" if ours else f"benchmarks.rivals.{options.strategy}")
    train = tool.prepare(options)
    wire.send("imported")
    train(wire)


if __name__ == "__main__":
    main()
