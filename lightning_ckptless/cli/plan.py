"""The placement of a run's replicas as recorded in its ledger, compared with what the arenas hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lightning_ckptless.cli.runs import Run
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.placement import Placement, place
from lightning_ckptless.protocol.placement_table import PlacementTable, table_of
from lightning_ckptless.protocol.redundancy import protection_of
from lightning_ckptless.protocol.versions import Replica


def plan_of(run: Run) -> PlacementTable | None:
    """Return the tables of the newest placement; None without copies, or before the first placement."""
    events = run.of("placement")
    if not events or not events[-1].fields["copies"]:
        return None
    facts = events[-1].fields
    return table_of(_placement(events[-1]), facts["sizes_bytes"], kind=facts["kind"], slots=facts.get("slots", 2))


def _placement(event: Event) -> Placement:
    """Rebuild the recorded placement, with the recorded holders."""
    facts = event.fields
    made = place(facts["domains"], facts["copies"], kind=facts["kind"])
    return replace(made, holders=tuple(tuple(others) for others in facts["holders"]))


def protection_in(run: Run, replicas: Collection[Replica], nodes_here: Collection[str]) -> str:
    """Describe how many shards have all their copies, in a sentence; empty if no placement is known.

    Args:
        run: the run and its ledger.
        replicas: replicas in the arenas on this host.
        nodes_here: nodes whose arenas are on this host.
    """
    if not (events := run.of("placement")):
        return ""
    facts = events[-1].fields
    elsewhere = sorted(set(facts["nodes"]) - set(nodes_here))
    if not elsewhere:
        return protection_of(replicas, facts["holders"], facts["nodes"], since=_since(run)).reason
    committed = run.of("committed")
    if not committed or committed[-1].at < events[-1].at:
        return f"unknown: {_arenas_of(len(elsewhere))} on other hosts"
    step, shards = committed[-1].fields["step"], len(facts["holders"])
    return (
        f"{shards} of {shards} shards had all copies of step {step}, according to the ledger; "
        f"{_arenas_of(len(elsewhere))} on other hosts"
    )


def _arenas_of(nodes: int) -> str:
    return "the arena of 1 node is" if nodes == 1 else f"the arenas of {nodes} nodes are"


def _since(run: Run) -> str:
    """Return the version since which all copies have been complete: the last restored one, or the first."""
    restored = run.of("restored")
    if restored:
        return str(restored[-1].fields["version"])
    first = run.of("committed")
    return f"step {first[0].fields['step']}" if first else ""
