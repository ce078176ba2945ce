"""The tables of `relaunch`."""

from __future__ import annotations

from typing import Any

from benchmarks.quantiles import median, quantile, summary
from benchmarks.tables import Table, verdict

PHASES = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s")
Kill = dict[str, Any]

PRELOADED, FRESH = "ckptless run", "ckptless run --no-preload"


def survived(kills: list[Kill]) -> list[Kill]:
    """Return the kills that the job survived."""
    return [kill for kill in kills if "failed" not in kill]


def own_share_s(kill: Kill) -> float:
    """Return the seconds of a recovery without the start of the slowest process and its imports.

    They are the time from the kill to the request for new processes, and from the end of the script's imports to the
    first step. The rest would pass with any launcher.
    """
    spawned_s = kill["ledger"]["spawned_at"] - kill["killed_at"]
    return float(kill["seconds"] - (max(rank["imported"] for rank in kill["ranks"]) - spawned_s))


def summary_table(results: dict[str, Any], ranks: int = 2) -> Table:
    """Return the table of recovery times and replayed steps."""
    table = Table(
        f"SIGKILL of one of {ranks} ranks to the first step finished by all",
        ("launcher, strategy", "kills", "survived", "p50 s", "p95 s", "max s", "steps replayed p50", "max",
         "committed steps lost"),
    )  # fmt: skip
    table.note(
        "Steps replayed are steps that had been finished. A committed step is one that a rank has seen committed on "
        "all ranks; without our strategy there are none, and the steps since the last checkpoint file are lost.",
    )
    for name, kills in results["kills"].items():
        good = survived(kills)
        if not good:
            table.add(name, len(kills), 0, *6 * ("",))
            continue
        seconds = summary([kill["seconds"] for kill in good])
        again = [float(kill["repeated_steps"]) for kill in good]
        lost = sum(kill["lost_committed_steps"] for kill in good) if "ddp" not in name else ""
        three = [f"{seconds[key]:.2f}" for key in ("p50", "p95", "max")]
        table.add(name, len(kills), len(good), *three, f"{median(again):g}", f"{max(again):g}", lost)
    _judge(table, results)
    return table


def _judge(table: Table, results: dict[str, Any]) -> None:
    preloaded = [kill["seconds"] for kill in survived(results["kills"].get(PRELOADED, []))]
    if preloaded:
        table.note(f"Preloaded, p50: {verdict(median(preloaded), 1.0, 's')}")
        table.note(f"Preloaded, p95: {verdict(quantile(preloaded, 0.95), 2.0, 's')}")
    fresh = [own_share_s(kill) for kill in survived(results["kills"].get(FRESH, [])) if "ledger" in kill]
    if fresh:
        table.note(f"New interpreters, without process start and imports, p50: {verdict(median(fresh), 0.3, 's')}")


def phases_table(results: dict[str, Any]) -> Table:
    """Return the table of the phases of a recovery according to the ledger."""
    table = Table(
        "Phases according to the ledger, medians in s",
        ("launcher, strategy", *(name.removesuffix("_s") for name in PHASES), "total", "measured from outside"),
    )
    table.note(
        "detect: from the exit to its detection by the agent; abort: until the survivors have exited; regroup: until "
        "the new workers have met, including start and imports; restore: until training resumes; replay: until the "
        "first new step is committed on all ranks, which is a little later than finished. torchrun's agent does not "
        "report exit times: its detection and stopping belong to no phase.",
    )
    for name, kills in results["kills"].items():
        accounts = [kill["ledger"] for kill in survived(kills) if "ledger" in kill]
        if accounts:
            phases = [f"{median([account['phases'][phase] for account in accounts]):.3f}" for phase in PHASES]
            total = median([account["total_s"] for account in accounts])
            table.add(name, *phases, f"{total:.2f}", f"{median([kill['seconds'] for kill in survived(kills)]):.2f}")
    return table


def moments_table(results: dict[str, Any]) -> Table:
    """Return the table of the recovery as seen by the script, which is measured alike for all opponents."""
    spans = (
        ("kill to new script", None, "script"),
        ("imports", "script", "imported"),
        ("model, trainer", "imported", "fit"),
        ("fit to training", "fit", "train"),
        ("first step", "train", "step"),
    )
    table = Table(
        "The same as seen by the script, slowest rank, medians in s",
        ("launcher, strategy", *(name for name, _, _ in spans), "total"),
    )
    table.note(
        "fit to training: process group, restore, Lightning's setup. The sum of medians differs a little from the "
        "median of sums.",
    )
    for name, kills in results["kills"].items():
        good = survived(kills)
        if good:
            cells = [f"{median([_span(kill, start, end) for kill in good]):.3f}" for _, start, end in spans]
            table.add(name, *cells, f"{median([kill['seconds'] for kill in good]):.2f}")
    return table


def _span(kill: Kill, start: str | None, end: str) -> float:
    # A standby had done some of this before the kill.
    ends = [rank[end] for rank in kill["ranks"]]
    starts = [rank[start] for rank in kill["ranks"]] if start else []
    return float(max(0.0, *ends) - max(0.0, *starts, 0.0))


def stock_table(results: dict[str, Any]) -> Table:
    """Return the table of torchrun's relaunches with its default settings."""
    table = Table("torchrun without changes", ("try", "recovered", "starts", "s"))
    table.note("Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which is set for the table above.")
    for number, kill in enumerate(results["stock"], 1):
        failed = "failed" in kill
        starts = "" if failed else f"{kill['starts']:g}"
        table.add(number, "no" if failed else "yes", starts, "" if failed else f"{kill['seconds']:.1f}")
    if results["stock"]:
        good = [kill for kill in results["stock"] if "failed" not in kill and kill["starts"] <= 1]
        bad, all_tries = len(results["stock"]) - len(good), len(results["stock"])
        table.note(f"{bad} of {all_tries} tries did not recover with one restart within 60 s.")
    return table
