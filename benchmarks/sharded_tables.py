"""The tables of `sharded`, from what the ranks have said."""

from __future__ import annotations

from typing import Any

from benchmarks.quantiles import median
from benchmarks.tables import Table, verdict

EVERY = 4
STAGING_TARGET = 1.25
"""Times a plain memcpy: four fifths of its speed."""


def version_costs_s(steps_s: list[float]) -> list[float]:
    """What each version has cost: the two steps that it touches, beyond the two between.

    Args:
        steps_s: whole cycles of four steps; a version is taken at the end of the last, and copied beside the first.
    """
    cycles = [steps_s[at : at + EVERY] for at in range(0, len(steps_s), EVERY)]
    return [first + last - second - third for first, second, third, last in cycles]


def plain_step_s(steps_s: list[float]) -> float:
    """The median of the steps that no version touches."""
    return median([step for at, step in enumerate(steps_s) if at % EVERY in (1, 2)])


def bytes_table(results: dict[str, Any]) -> Table:
    """Bytes per rank against the formula."""
    table = Table(
        "Shared memory per rank, and bytes per version, against the formula",
        ("model", "strategy", "ranks", "state MB", "kept", "formula MB", "arena per rank MB", "over the formula",
         "sent MB"),
    )  # fmt: skip
    table.note(
        "Formula: 2 (1 + m) / N of parameters and optimizer state, for m kept shards and N ranks. Sent: by the rank "
        "that sends most, per version."
    )
    for cell in results["cells"]:
        state, kept, said = cell["state_bytes"] / 1e6, cell["kept"], cell["ranks_said"]
        formula = 2 * (1 + kept) / cell["ranks"] * state
        arena = said[0]["arena_bytes"] / 1e6 / cell["ranks"]
        sent = max(rank["sent_bytes"] for rank in said) / 1e6
        table.add(
            cell["size"], cell["strategy"], cell["ranks"], f"{state:.0f}", kept, f"{formula:.0f}", f"{arena:.0f}",
            f"{arena / formula - 1:+.2%}", f"{sent:.0f}",
        )  # fmt: skip
    for reason in results["left_out"]:
        table.note(f"Left out: {reason}")
    return table


def step_table(results: dict[str, Any]) -> Table:
    """What a version costs, beside what torch's `async_save` takes for the same state."""
    table = Table(
        "One version, and one async_save of the same state to the disk",
        ("model", "strategy", "ranks", "plain step ms", "a version costs ms", "least to most", "of a step", "staged ms",
         "committed ms", "async_save: waits ms", "on disk after ms"),
    )  # fmt: skip
    table.note(
        "A version costs: the step at whose end it is taken and the one beside which it is copied, beyond two others "
        "of the same cycle; slowest rank, median over versions. Staged, committed: after it was handed over."
    )
    table.note("async_save: what the training thread waits in it, for the save before and for the copy of the state.")
    for cell in results["cells"]:
        costs, plain = version_costs_s(cell["steps_s"]), plain_step_s(cell["steps_s"])
        staged, committed = (
            1e3 * median([value for rank in cell["ranks_said"] for value in rank.get(name, [0.0])])
            for name in ("stage_s", "round_s")
        )
        saves = cell["saves"]
        waits, total = (
            f"{1e3 * median([save[name] for save in saves]):.0f}" if saves else "" for name in ("blocked_s", "total_s")
        )
        table.add(
            cell["size"], cell["strategy"], cell["ranks"], f"{1e3 * plain:.0f}", f"{1e3 * median(costs):.0f}",
            f"{1e3 * min(costs):.0f} to {1e3 * max(costs):.0f}", f"{median(costs) / plain:+.1%}", f"{staged:.0f}",
            f"{committed:.0f}", waits, total,
        )  # fmt: skip
    return table


def staging_table(results: dict[str, Any]) -> Table:
    """Staging against memcpy."""
    table = Table(
        "Staging the shard of one rank, against a plain memcpy into warm shared memory, in turns in one process",
        ("model", "ranks", "MB", "pieces", "memcpy GB/s", "staging GB/s", "of memcpy's speed"),
    )
    for row in results["staging"]:
        plain, staged = median(row["memcpy_s"]), median(row["stage_s"])
        size = row["shard_bytes"]
        table.add(
            row["size"], row["ranks"], f"{size / 1e6:.0f}", row["pieces"], f"{size / plain / 1e9:.1f}",
            f"{size / staged / 1e9:.1f}", f"{plain / staged:.0%}",
        )  # fmt: skip
        table.note(f"{row['size']}, {row['ranks']} ranks: {verdict(staged / plain, STAGING_TARGET, 'x memcpy')}")
    return table


def frozen_table(results: dict[str, Any]) -> Table:
    """What is saved where nine tenths of the parameters are frozen."""
    table = Table(
        "Nine tenths of the parameters frozen: a version of the shard of one rank of two, in turns in one process",
        (
            "model",
            "MB",
            "still MB",
            "written MB",
            "sent to a holder MB",
            "stage and checksum ms",
            "without ms",
            "of it",
        ),
    )
    table.note("Without: with the same tensors in a layout that does not know of any that stand still.")
    for row in results["frozen"]:
        with_s, without_s = median(row["still_s"]), median(row["moving_s"])
        sizes = (f"{row[name] / 1e6:.1f}" for name in ("shard_bytes", "still_bytes", "written_bytes", "sent_bytes"))
        table.add(row["size"], *sizes, f"{1e3 * with_s:.1f}", f"{1e3 * without_s:.1f}", f"{with_s / without_s:.0%}")
    return table
