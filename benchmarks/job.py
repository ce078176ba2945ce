"""The script that the benchmarks start in every way there is; `--strategy` says who is measured.

It stands apart from `training` so that the moment of its first line is known before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.wire import SOCKET, Wire


@dataclass(frozen=True)
class JobOptions:
    """What a job trains, and how.

    Args:
        size: of the model, one of `gpt.WIDTHS`.
        batch: samples per rank and step.
        strategy: `ckptless` or `ddp`.
        strategy_options: of the strategy.
        devices: ranks.
        steps: optimizer steps; -1 to train until told to stop.
        checkpoint_every: steps between two checkpoint files; 0 for none.
        root: folder for what a run leaves behind.
        turns: train only when it is this job's turn.
        async_save_every: steps between two calls of torch's `async_save`; 0 for none.
        accelerator: `cpu` or `gpu`.
        mirror_habit: of the mirror's thread, one of `training.MIRROR_HABITS`; nothing for its own.
        sharded: by FSDP2 over all ranks, under the sibling of the strategy for that.
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
    mirror_habit: str = ""

    def to_arguments(self) -> list[str]:
        """The options as the script's command line."""
        return [f"--{f.name.replace('_', '-')}={json.dumps(getattr(self, f.name))}" for f in fields(self)]

    @classmethod
    def from_arguments(cls, argv: list[str] | None = None) -> JobOptions:
        """The options of a command line; the values are JSON."""
        parser = argparse.ArgumentParser(description=__doc__)
        for option in fields(cls):
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=json.loads, default=argparse.SUPPRESS)
        return cls(**vars(parser.parse_args(argv)))


def main() -> None:
    """Train, and tell the benchmark of each moment."""
    began_at = time.time()
    wire = Wire(os.environ[SOCKET])
    wire.say("script", at=began_at)
    from benchmarks.training import make_strategy, train  # noqa: PLC0415 - the time of this import is measured

    options = JobOptions.from_arguments()
    strategy = make_strategy(options)
    wire.say("imported")
    train(options, strategy, wire)


if __name__ == "__main__":
    main()
