"""The tables of `elastic`."""

from __future__ import annotations

from typing import Any

from benchmarks.elastic_nodes import Bound
from benchmarks.quantiles import median
from benchmarks.relaunch_tables import PHASES
from benchmarks.tables import Table

Results = dict[str, dict[str, Any]]


def shrink_table(results: Results, bound: Bound) -> Table:
    """Return the table of the time from the kill of a node to the first step of the others."""
    table = Table(
        "A node of four is killed, to the first step finished by all of the other three",
        ("how", "kills", "p50 s", "max s", "detected after p50 s", "from there p50 s", "max s", "one step s",
         "steps replayed p50", "max"),
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
        f"keep_alive_max_attempt={bound.attempts} plus one interval, counted from its last heartbeat. Detected: the "
        f"ledger's `node_lost`. {bound.last_call_s} s of the time from there is last_call_timeout, during which the "
        "rendezvous waits for another node; its agents poll once a second."
    )
    table.note(
        "torchrun's agents do not report when they detect the loss: their workers fail immediately, and the "
        f"rendezvous waits {bound.interval_s * bound.attempts} s before it removes the lost node."
    )
    for name, found in results.items():
        if found["failed"]:
            table.note(f"{name}: {found['failed'].splitlines()[0]}")
    return table


def phases_table(results: Results) -> Table:
    """Return the table of the phases according to the ledgers."""
    table = Table(
        "Phases according to the ledger, medians in s",
        ("how", "change", "recovery", *(name.removesuffix("_s") for name in PHASES), "total"),
    )
    table.note(
        "detect: from the last heartbeat of the lost node until the ranks are notified, or ended, which is after the "
        "agents have re-rendezvoused; zero at the return of a node, since no rank is lost then."
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
    """Return the table of the cost of a node's return to the others."""
    table = Table(
        "The node rejoins",
        ("how", "returns", "others paused p50 s", "max s", "agent start to a step of all p50 s", "max s",
         "steps of the others in the meantime p50", "max", "steps replayed p50", "max"),
    )  # fmt: skip
    table.note("Paused: from the last step of three ranks to the first of four, slowest rank.")
    for name, found in results.items():
        comes = [cycle["grow"] for cycle in found["cycles"]]
        if comes:
            table.add(
                name, len(comes), *_two([come["paused_s"] for come in comes]),
                *_two([come["seconds"] for come in comes]), *_two([come["steps_meanwhile"] for come in comes], "g"),
                *_two([come["repeated_steps"] for come in comes], "g"),
            )  # fmt: skip
    return table


def exactness_table(results: Results) -> Table:
    """Return the table of the samples that were used, and of the differences in the result."""
    table = Table(
        "Samples used in all epochs, and the result compared with an undisturbed run",
        ("how", "kills", "samples due", "repeated", "skipped", "largest difference of a weight",
         "of an epoch's loss, relative"),
    )  # fmt: skip
    table.note(
        "Counted from what each rank has recorded, without the steps that were rolled back. Repeated: a sample that an "
        "epoch uses a second time. Skipped: a sample that an epoch does not use."
    )
    for name, found in results.items():
        if "due" in found:
            compared = [f"{found[key]:.1e}" if key in found else "" for key in ("weight", "loss")]
            table.add(name, len(found["cycles"]), found["due"], found["twice"], found["never"], *compared)
    return table


def _two(values: list[float], form: str = ".2f") -> tuple[str, str]:
    return f"{median(values):{form}}", f"{max(values):{form}}"
