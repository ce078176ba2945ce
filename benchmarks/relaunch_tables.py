"""The tables of `relaunch`."""

from __future__ import annotations

from typing import Any

from benchmarks.quantiles import median, quantile, summary
from benchmarks.tables import Table, verdict

PHASES = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s")
Kill = dict[str, Any]

PRELOADED, FRESH = "ckptless run", "ckptless run --no-preload"


def came_back(kills: list[Kill]) -> list[Kill]:
    """The kills that the job has survived."""
    return [kill for kill in kills if "failed" not in kill]


def own_share_s(kill: Kill) -> float:
    """Seconds of a recovery beside the start of the slowest process and its imports.

    From the kill to the request of new processes, and from the end of the script's imports to the first step: the rest
    would pass with any launcher.
    """
    spawned_s = kill["ledger"]["spawned_at"] - kill["killed_at"]
    return float(kill["seconds"] - (max(rank["imported"] for rank in kill["ranks"]) - spawned_s))


def summary_table(results: dict[str, Any], ranks: int = 2) -> Table:
    """How long it takes and what is repeated."""
    table = Table(
        f"SIGKILL of one of {ranks} ranks to the first step finished by all",
        ("launcher, strategy", "kills", "survived", "p50 s", "p95 s", "max s", "steps run again p50", "max",
         "committed steps lost"),
    )  # fmt: skip
    table.note(
        "Steps run again: finished ones. A committed step is one that a rank has seen committed on all ranks; without "
        "our strategy there are none, and what is lost are the steps since the last checkpoint file.",
    )
    for name, kills in results["kills"].items():
        good = came_back(kills)
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
    preloaded = [kill["seconds"] for kill in came_back(results["kills"].get(PRELOADED, []))]
    if preloaded:
        table.note(f"Preloaded, p50: {verdict(median(preloaded), 1.0, 's')}")
        table.note(f"Preloaded, p95: {verdict(quantile(preloaded, 0.95), 2.0, 's')}")
    fresh = [own_share_s(kill) for kill in came_back(results["kills"].get(FRESH, [])) if "ledger" in kill]
    if fresh:
        table.note(
            "Fresh processes, own share (all but start of the processes and imports), p50: "
            f"{verdict(median(fresh), 0.3, 's')}"
        )


def phases_table(results: dict[str, Any]) -> Table:
    """The phases of a recovery by the ledger."""
    table = Table(
        "Phases by the run's own ledger, medians in s",
        ("launcher, strategy", *(name.removesuffix("_s") for name in PHASES), "total", "seen from outside"),
    )
    table.note(
        "detect: death to its notice by the agent; abort: until the survivors are gone; regroup: until the new workers "
        "have met, start and imports included; restore: until training goes on; replay: until the first new step is "
        "committed on all ranks, which is a little later than finished. torchrun's agent tells no times of death: its "
        "detection and stopping are in no phase.",
    )
    for name, kills in results["kills"].items():
        accounts = [kill["ledger"] for kill in came_back(kills) if "ledger" in kill]
        if accounts:
            phases = [f"{median([account['phases'][phase] for account in accounts]):.3f}" for phase in PHASES]
            total = median([account["total_s"] for account in accounts])
            table.add(name, *phases, f"{total:.2f}", f"{median([kill['seconds'] for kill in came_back(kills)]):.2f}")
    return table


def moments_table(results: dict[str, Any]) -> Table:
    """The recovery as the script has seen it, the same for all opponents."""
    spans = (
        ("kill to new script", None, "script"),
        ("imports", "script", "imported"),
        ("model, trainer", "imported", "fit"),
        ("fit to training", "fit", "train"),
        ("first step", "train", "step"),
    )
    table = Table(
        "The same seen by the script, slowest rank, medians in s",
        ("launcher, strategy", *(name for name, _, _ in spans), "all"),
    )
    table.note(
        "fit to training: process group, restoring, Lightning's set-up. The sum of medians differs a little from the "
        "median of sums.",
    )
    for name, kills in results["kills"].items():
        good = came_back(kills)
        if good:
            cells = [f"{median([_span(kill, start, end) for kill in good]):.3f}" for _, start, end in spans]
            table.add(name, *cells, f"{median([kill['seconds'] for kill in good]):.2f}")
    return table


def _span(kill: Kill, start: str | None, end: str) -> float:
    # A process that was in reserve had some of it behind it when it was needed.
    ends = [rank[end] for rank in kill["ranks"]]
    starts = [rank[start] for rank in kill["ranks"]] if start else []
    return float(max(0.0, *ends) - max(0.0, *starts, 0.0))


def stock_table(results: dict[str, Any]) -> Table:
    """How often torchrun's relaunch fails in its own defaults."""
    table = Table("torchrun as it is", ("try", "came back", "starts", "s"))
    table.note("Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which the table above has set for it.")
    for number, kill in enumerate(results["stock"], 1):
        failed = "failed" in kill
        starts = "" if failed else f"{kill['starts']:g}"
        table.add(number, "no" if failed else "yes", starts, "" if failed else f"{kill['seconds']:.1f}")
    if results["stock"]:
        good = [kill for kill in results["stock"] if "failed" not in kill and kill["starts"] <= 1]
        bad, all_tries = len(results["stock"]) - len(good), len(results["stock"])
        table.note(f"{bad} of {all_tries} tries did not come back by one restart within 60 s.")
    return table
