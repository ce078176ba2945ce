"""What the ranks of a counted run (`tests/lab/counted.py`) have trained on, step by step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

COUNTED = Path(__file__).parents[1] / "lab" / "counted.py"


@dataclass
class Account:
    """A counted run that has ended.

    Args:
        folder: that it wrote into.
        steps: by epoch and step the samples of the attempt that counts, of all ranks, each with how often it came.
        worlds: by epoch and step how many ranks made it.
    """

    folder: Path
    steps: dict[tuple[int, int], Counter[int]] = field(default_factory=dict)
    worlds: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """The numbers of ranks that there were, in the order of steps; each change once."""
        found: list[int] = []
        for step in sorted(self.worlds):
            if found[-1:] != [self.worlds[step]]:
                found.append(self.worlds[step])
        return found

    @property
    def processes(self) -> int:
        """How many processes have trained, all ranks and all generations together."""
        return len(list(self.folder.glob("seen-*.jsonl")))

    @property
    def epochs(self) -> list[dict[str, float]]:
        """What was logged of each epoch; the last time counts."""
        rows = [json.loads(line) for line in (self.folder / "epochs.jsonl").read_text().splitlines()]
        return list({row["epoch"]: row for row in rows}.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights at the end."""
        return {n: torch.tensor(values) for n, values in json.loads((self.folder / "end.json").read_text()).items()}


def account_of(folder: Path) -> Account:
    """Read what all processes of a run have put down: of each step the attempt of the last generation counts."""
    attempts: dict[tuple[int, int], dict[int, list[dict[str, Any]]]] = {}
    for path in folder.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            attempts.setdefault((row["epoch"], row["step"]), {}).setdefault(row["generation"], []).append(row)
    account = Account(folder)
    for step, by_generation in attempts.items():
        rows = by_generation[max(by_generation)]
        account.steps[step] = Counter(sample for row in rows for sample in row.get("samples", ()))
        account.worlds[step] = max(row.get("done", 0) for row in rows)
    return account


def furthest(left: Account, right: Account) -> float:
    """The largest difference between two runs' weights."""
    a, b = left.weights(), right.weights()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
