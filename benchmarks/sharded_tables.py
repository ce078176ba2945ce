"""The tables of `sharded`, from the reports of the ranks."""

from __future__ import annotations

from typing import Any

from benchmarks.quantiles import median
from benchmarks.tables import Table, verdict

EVERY = 4
STAGING_TARGET = 1.25
"""As a multiple of the time of a plain memcpy: four fifths of its speed."""


def version_costs_s(steps_s: list[float]) -> list[float]:
    """Return the cost of each version in seconds: the two steps that it affects, minus the two in between.

    Args:
        steps_s: step times in whole cycles of four; a version is taken at the end of the last, copied during the first.
    """
    cycles = [steps_s[at : at + EVERY] for at in range(0, len(steps_s), EVERY)]
    return [first + last - second - third for first, second, third, last in cycles]


def plain_step_s(steps_s: list[float]) -> float:
    """Return the median of the steps that no version affects."""
    return median([step for at, step in enumerate(steps_s) if at % EVERY in (1, 2)])


def bytes_table(results: dict[str, Any]) -> Table:
    """Return the table of bytes per rank, compared with the formula."""
    table = Table(
        "Shared memory per rank, and bytes per version, against the formula",
        ("model", "strategy", "ranks", "state MB", "kept", "formula MB", "arena per rank MB", "over the formula",
         "sent MB"),
    )  # fmt: skip
    table.note(
        "Formula: 2 (1 + m) / N of parameters and optimizer state, for m kept shards and N ranks. Sent: by the rank "
        "that sends the most, per version."
    )
    for cell in results["cells"]:
        state, kept, reports = cell["state_bytes"] / 1e6, cell["kept"], cell["rank_reports"]
        formula = 2 * (1 + kept) / cell["ranks"] * state
        arena = reports[0]["arena_bytes"] / 1e6 / cell["ranks"]
        sent = max(rank["sent_bytes"] for rank in reports) / 1e6
        table.add(
            cell["size"], cell["strategy"], cell["ranks"], f"{state:.0f}", kept, f"{formula:.0f}", f"{arena:.0f}",
            f"{arena / formula - 1:+.2%}", f"{sent:.0f}",
        )  # fmt: skip
    for reason in results["left_out"]:
        table.note(f"Left out: {reason}")
    return table


def step_table(results: dict[str, Any]) -> Table:
    """Return the table of the cost of a version, and of torch's `async_save` of the same state."""
    table = Table(
        "One version, and one async_save of the same state to the disk",
        ("model", "strategy", "ranks", "plain step ms", "a version costs ms", "min to max", "share of a step",
         "staged ms", "committed ms", "async_save: waits ms", "on disk after ms"),
    )  # fmt: skip
    table.note(
        "A version costs: the step at whose end it is taken plus the step during which it is copied, minus two other "
        "steps of the same cycle; slowest rank, median over versions. Staged, committed: time after the hand-over."
    )
    table.note(
        "async_save: time that the training thread waits in it, for the previous save and for the copy of the state."
    )
    for cell in results["cells"]:
        costs, plain = version_costs_s(cell["steps_s"]), plain_step_s(cell["steps_s"])
        staged, committed = (
            1e3 * median([value for rank in cell["rank_reports"] for value in rank.get(name, [0.0])])
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
    """Return the table of staging, compared with memcpy."""
    table = Table(
        "Staging the shard of one rank, against a plain memcpy into warm shared memory, alternating in one process",
        ("model", "ranks", "MB", "pieces", "memcpy GB/s", "staging GB/s", "share of memcpy speed"),
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
    """Return the table of what is saved when nine tenths of the parameters are frozen."""
    table = Table(
        "Nine tenths of the parameters frozen: a version of the shard of one rank of two, alternating in one process",
        (
            "model",
            "MB",
            "static MB",
            "written MB",
            "sent to a holder MB",
            "stage and checksum ms",
            "without ms",
            "ratio",
        ),
    )
    table.note("Without: the same tensors in a layout that treats none of them as static.")
    for row in results["frozen"]:
        with_s, without_s = median(row["static_s"]), median(row["plain_s"])
        sizes = (f"{row[name] / 1e6:.1f}" for name in ("shard_bytes", "static_bytes", "written_bytes", "sent_bytes"))
        table.add(row["size"], *sizes, f"{1e3 * with_s:.1f}", f"{1e3 * without_s:.1f}", f"{with_s / without_s:.0%}")
    return table
