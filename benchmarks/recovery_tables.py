"""The tables of `recovery`."""

from __future__ import annotations

from typing import Any

from benchmarks.quantiles import median, quantile, summary
from benchmarks.relaunch_tables import PHASES, own_share_s, survived
from benchmarks.tables import Table, verdict

FRESH = "relaunch, new interpreters"
TARGETS = {
    "in place, standby": ("in addition to one step", 0.2, 0.4),
    "in place, new process": ("", 0.6, 1.0),
    "relaunch, preloaded": ("", 1.0, 2.0),
}
"""By row: the quantity that is compared, and the targets of its p50 and p95 in s."""


def ladder_table(results: dict[str, Any], ranks: int) -> Table:
    """Return the table of the time and the replayed steps of each kind of recovery."""
    table = Table(
        f"SIGKILL of one of {ranks} ranks to the first step finished by all",
        ("how", "kills", "survived", "p50 s", "p95 s", "max s", "one step s", "steps replayed p50", "max",
         "committed steps lost", "exact", "rank 0 survived"),
    )  # fmt: skip
    for name, kills in results["kills"].items():
        good = survived(kills)
        if not good:
            table.add(name, len(kills), 0, *8 * ("",), rank_0_survived(kills))
            continue
        seconds = summary([kill["seconds"] for kill in good])
        again = [float(kill["repeated_steps"]) for kill in good]
        lost = sum(kill["lost_committed_steps"] for kill in good) if "ddp" not in name else ""
        table.add(
            name,
            len(kills),
            len(good),
            *(f"{seconds[key]:.2f}" for key in ("p50", "p95", "max")),
            f"{median([kill['step_s'] for kill in good]):.2f}",
            f"{median(again):g}",
            f"{max(again):g}",
            lost,
            exact(good),
            rank_0_survived(kills),
        )
    for name, (what, p50_s, p95_s) in TARGETS.items():
        _judge(table, name, survived(results["kills"].get(name, [])), what, p50_s, p95_s)
    fresh = [kill for kill in survived(results["kills"].get(FRESH, [])) if "ledger" in kill]
    if fresh:
        own_s = median([own_share_s(kill) for kill in fresh])
        table.note(f"{FRESH}, without process start and imports, p50: {verdict(own_s, 0.3, 's')}")
    table.note(
        "Steps replayed are steps that had been finished. Exact: in the steps after the recovery, a checksum of "
        "weights and moments on all ranks equals that of the same step of an undisturbed run. The drill compares "
        "every bit."
    )
    if installed := results.get("rivals"):
        table.note("Other tools: " + ", ".join(f"{name} {version}" for name, version in installed.items()) + ".")
    return table


def exact(kills: list[Any]) -> str:
    """Return how many of the compared recoveries were exact, in words."""
    compared = [kill["exact"] for kill in kills if "exact" in kill]
    return f"{sum(compared)} of {len(compared)}" if compared else ""


def rank_0_survived(kills: list[Any]) -> str:
    """Return how many of the kills of rank 0 were survived, in words."""
    leader = [kill for kill in kills if kill.get("victim") == 0]
    return f"{len(survived(leader))} of {len(leader)}"


def _judge(table: Table, name: str, kills: list[Any], what: str, p50_s: float, p95_s: float | None) -> None:
    if not kills:
        return
    seconds = [kill["seconds"] - (kill["step_s"] if what else 0.0) for kill in kills]
    label = f"{name}, {what}" if what else name
    table.note(f"{label}, p50: {verdict(median(seconds), p50_s, 's')}")
    if p95_s is not None:
        table.note(f"{label}, p95: {verdict(quantile(seconds, 0.95), p95_s, 's')}")


def phases_of_kinds_table(results: dict[str, Any]) -> Table:
    """Return the table of the phases according to the ledgers."""
    table = Table(
        "Phases according to the ledger, medians in s",
        ("how", *(name.removesuffix("_s") for name in PHASES), "total"),
    )
    table.note(
        "In place: detect ends when the agent has seen the exit, abort when the reporting rank has been notified, "
        "regroup when all ranks have met, restore when the state is in place, replay when the first new step is "
        "committed."
    )
    for name, kills in results["kills"].items():
        accounts = [kill["ledger"] for kill in survived(kills) if "ledger" in kill]
        if accounts:
            phases = [f"{median([account['phases'][phase] for account in accounts]):.3f}" for phase in PHASES]
            table.add(name, *phases, f"{median([account['total_s'] for account in accounts]):.2f}")
    return table
