"""The tables of `elastic`."""

from __future__ import annotations

from typing import Any

from benchmarks.elastic_nodes import Bound
from benchmarks.quantiles import median
from benchmarks.relaunch_tables import PHASES
from benchmarks.tables import Table

Results = dict[str, dict[str, Any]]


def shrink_table(results: Results, bound: Bound) -> Table:
    """From the kill of a node to the first step of the others, with its detection and without."""
    table = Table(
        "A node of four is killed, to the first step finished by all of the other three",
        ("how", "kills", "p50 s", "max s", "noticed after p50 s", "from there p50 s", "max s", "one step s",
         "steps run again p50", "max"),
    )  # fmt: skip
    for name, found in results.items():
        kills = [cycle["shrink"] for cycle in found["cycles"]]
        if not kills:
            table.add(name, 0, *8 * ("",))
            continue
        noticed = [kill["noticed_s"] for kill in kills if "noticed_s" in kill]
        beyond = [kill["seconds"] - kill["noticed_s"] for kill in kills if "noticed_s" in kill]
        table.add(
            name, len(kills), *_two([kill["seconds"] for kill in kills]),
            f"{median(noticed):.2f}" if noticed else "", *(_two(beyond) if beyond else ("", "")),
            f"{median([kill['step_s'] for kill in kills]):.2f}",
            *_two([kill["repeated_steps"] for kill in kills], "g"),
        )  # fmt: skip
    lost_s = bound.interval_s * (bound.attempts + 1)
    table.note(
        f"A node is lost after {lost_s} s without a heartbeat: keep_alive_interval={bound.interval_s} x "
        f"keep_alive_max_attempt={bound.attempts} and one interval, counted from its last one. Noticed: the ledger's "
        f"`node_lost`. From there {bound.last_call_s} s is last_call_timeout, for which the rendezvous waits for "
        "another node; its agents look once a second."
    )
    table.note(
        "torchrun's agents do not say when they notice: their workers fail at once, and the rendezvous waits for "
        f"{bound.interval_s * bound.attempts} s until the lost one is struck out."
    )
    for name, found in results.items():
        if found["failed"]:
            table.note(f"{name}: {found['failed'].splitlines()[0]}")
    return table


def phases_table(results: Results) -> Table:
    """The phases by the runs' own ledgers."""
    table = Table(
        "Phases by the run's own ledger, medians in s",
        ("how", "change", "rung", *(name.removesuffix("_s") for name in PHASES), "total"),
    )
    table.note(
        "detect: from the last sign of the lost node until the ranks are told to meet, or ended, which is after the "
        "agents have met anew; nothing at the return of a node, since nobody is lost then."
    )
    for name, found in results.items():
        for kind, change in (("shrink", "4 to 3"), ("grow", "3 to 4")):
            accounts = [cycle[kind]["ledger"] for cycle in found["cycles"] if "ledger" in cycle[kind]]
            if accounts:
                phases = [f"{median([account['phases'][phase] for account in accounts]):.3f}" for phase in PHASES]
                rungs = sorted({account["rung"] for account in accounts})
                total_s = median([account["total_s"] for account in accounts])
                table.add(name, change, ", ".join(rungs), *phases, f"{total_s:.2f}")
    return table


def grow_table(results: Results) -> Table:
    """What the return of a node costs the others."""
    table = Table(
        "The node comes back",
        ("how", "returns", "others stand still p50 s", "max s", "start of the agent to a step of all p50 s", "max s",
         "steps of the others meanwhile p50", "max", "steps run again p50", "max"),
    )  # fmt: skip
    table.note("Stand still: from the last step of three ranks to the first of four, by the slowest rank.")
    for name, found in results.items():
        comes = [cycle["grow"] for cycle in found["cycles"]]
        if comes:
            table.add(
                name, len(comes), *_two([come["still_s"] for come in comes]),
                *_two([come["seconds"] for come in comes]), *_two([come["steps_meanwhile"] for come in comes], "g"),
                *_two([come["repeated_steps"] for come in comes], "g"),
            )  # fmt: skip
    return table


def exactness_table(results: Results) -> Table:
    """What was trained on, and what has come of it."""
    table = Table(
        "What was trained on in all epochs, and the end beside that of a run which nobody left",
        ("how", "kills", "samples due", "came again", "never came", "largest difference of a weight",
         "of an epoch's loss, relative"),
    )  # fmt: skip
    table.note(
        "Counted from what each rank has put down, without the steps that were taken back: a sample that comes a "
        "second time in an epoch came again, one of an epoch that has not had it never came."
    )
    for name, found in results.items():
        if "due" in found:
            compared = [f"{found[key]:.1e}" if key in found else "" for key in ("weight", "loss")]
            table.add(name, len(found["cycles"]), found["due"], found["twice"], found["never"], *compared)
    return table


def _two(values: list[float], form: str = ".2f") -> tuple[str, str]:
    return f"{median(values):{form}}", f"{max(values):{form}}"
