"""Results of runs, one JSON line each, so that an interrupted soak test continues with the missing seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.bounds import bounds_s, silent_s
from benchmarks.soak.evidence import Evidence, Recovered, outcome_of, recoveries_of, times_of
from benchmarks.soak.scenario import Scenario


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        seed: seed of its scenario.
        configuration: what was trained, in words.
        load: whether all cores were kept busy.
        asked: planned faults.
        struck: injected faults.
        outcome: `good`, or the kind of failure.
        why: reason of the failure, in a sentence.
        lost_steps: number of lost committed steps.
        recoveries: recoveries, in order.
        leaks: what was left behind.
        wall_s: seconds from start to end.
        folder: folder with the files of the run; empty if it was removed.
        left_out: faults that this machine does not allow.
    """

    seed: int
    configuration: str
    load: bool
    asked: tuple[str, ...]
    struck: tuple[str, ...]
    outcome: str
    why: str = ""
    lost_steps: int = 0
    recoveries: tuple[Recovered, ...] = ()
    leaks: tuple[str, ...] = ()
    wall_s: float = 0.0
    folder: str = ""
    left_out: tuple[str, ...] = field(default=())

    @property
    def good(self) -> bool:
        """Whether the run passed."""
        return self.outcome == "good"


def judge(scenario: Scenario, evidence: Evidence) -> Result:
    """Evaluate a run."""
    recoveries = recoveries_of(evidence.events)
    outcome, why = outcome_of(
        exit_code=evidence.exit_code,
        identical=evidence.identical,
        lost=evidence.lost,
        leaks=evidence.leaks,
        late=times_of(recoveries, bounds_s(scenario), silent_s(scenario)),
    )
    return Result(
        seed=scenario.seed,
        configuration=str(scenario.configuration),
        load=scenario.load,
        asked=scenario.faults,
        struck=evidence.struck,
        outcome=outcome,
        why=evidence.difference if outcome == "different" else "; ".join(filter(None, (why, evidence.why))),
        lost_steps=evidence.lost,
        recoveries=tuple(recoveries),
        leaks=evidence.leaks,
        left_out=evidence.left_out,
    )


def append(path: Path, result: Result) -> None:
    """Append a result to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Result]:
    """Return the results in a file, the last one of each seed; an incomplete line is left out."""
    return list({result.seed: result for result in _lines(path)}.values())


def _lines(path: Path) -> Iterator[Result]:
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        yield _result(fields)


def _result(fields: dict[str, Any]) -> Result:
    recoveries = tuple(Recovered(**one) for one in fields.pop("recoveries"))
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Result(**(fields | lists), recoveries=recoveries)
