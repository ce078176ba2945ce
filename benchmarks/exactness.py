"""Compare jobs that were killed with undisturbed ones, bit for bit."""

from __future__ import annotations

from typing import Any

from benchmarks.kills import Opponent, job
from benchmarks.processes import with_torchrun
from benchmarks.recoveries import START_S, NoRecoveryError
from benchmarks.report import console
from benchmarks.scratch import Scratch, scratch

STEP_S = 2.0
"""Upper bound for the length of a step, in seconds."""


def reference_of(opponent: Opponent) -> Opponent:
    """Return the job to compare with: Lightning's own `ddp` for all that run a trainer, else the opponent itself."""
    if opponent.strategy == "torchft":
        return opponent
    return Opponent("torchrun, ddp, undisturbed", with_torchrun, "ddp", ranks=opponent.ranks)


def compare(kills: dict[str, list[dict[str, Any]]], opponents: tuple[Opponent, ...], size: str) -> None:
    """Record under `exact`, for every survived kill, whether the fingerprints of all ranks are the expected ones.

    Args:
        kills: kills by the opponent's name.
        opponents: all opponents.
        size: model size.
    """
    groups: dict[str, tuple[Opponent, list[dict[str, Any]]]] = {}
    for opponent in opponents:
        reference = reference_of(opponent)
        good = [kill for kill in kills.get(opponent.name, []) if "failed" not in kill]
        groups.setdefault(reference.strategy, (reference, []))[1].extend(good)
    with scratch() as place:
        for reference, good in groups.values():
            if not good:
                continue
            last = max(max(kill["fingerprints"]) for kill in good)
            try:
                right = undisturbed(reference, size, last, place)
            except NoRecoveryError as error:
                console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
                continue
            for kill in good:
                kill["exact"] = is_exact(kill["fingerprints"], right)


def is_exact(seen: dict[int, list[int]], right: dict[int, int]) -> bool:
    """Return whether all ranks had the expected fingerprint after each of the steps."""
    return all(values == [right[step]] for step, values in seen.items())


def undisturbed(opponent: Opponent, size: str, steps: int, place: Scratch) -> dict[int, int]:
    """Return the fingerprints of an undisturbed job, by step.

    Raises:
        NoRecoveryError: If the job ended or took too long.
    """
    with job(opponent, size, place, f"reference-{opponent.strategy}") as (watch, _):
        lives = watch.until(
            lambda lives: min(life.last_step for life in lives) >= steps, START_S + STEP_S * steps, f"step {steps}"
        )
        return {step: lives[0].fingerprints[step] for step in range(1, steps + 1)}
