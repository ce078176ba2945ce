"""The samples that each step of a counted run (`tests/lab/counted.py`) was trained on."""

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
    """The record of a counted run. Of several attempts at a step, the last one counts.

    Args:
        folder: folder of the run.
        steps: samples of all ranks, with their multiplicity, by epoch and step.
        worlds: number of ranks, by epoch and step.
    """

    folder: Path
    steps: dict[tuple[int, int], Counter[int]] = field(default_factory=dict)
    worlds: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """The world sizes in the order of steps, without repetitions."""
        found: list[int] = []
        for step in sorted(self.worlds):
            if found[-1:] != [self.worlds[step]]:
                found.append(self.worlds[step])
        return found

    @property
    def processes(self) -> int:
        """The number of processes that have trained, over all ranks and generations."""
        return len(list(self.folder.glob("seen-*.jsonl")))

    @property
    def epochs(self) -> list[dict[str, float]]:
        """The values logged for each epoch; the last row of an epoch counts."""
        rows = [json.loads(line) for line in (self.folder / "epochs.jsonl").read_text().splitlines()]
        return list({row["epoch"]: row for row in rows}.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the final weights."""
        return {n: torch.tensor(values) for n, values in json.loads((self.folder / "end.json").read_text()).items()}


def account_of(folder: Path) -> Account:
    """Read the records of all processes of a run; for each step, the attempt of the last generation counts."""
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


def largest_difference(left: Account, right: Account) -> float:
    """Return the largest absolute difference between the weights of two runs."""
    a, b = left.weights(), right.weights()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
