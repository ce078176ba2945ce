"""The plan of a run as its ledger has it: who keeps what, and how far the arenas are what was planned."""

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
    """The tables of the newest plan; None where nothing is kept for others, or no plan is known yet."""
    events = run.of("placement")
    if not events or not events[-1].fields["copies"]:
        return None
    facts = events[-1].fields
    return table_of(_placement(events[-1]), facts["sizes_bytes"], kind=facts["kind"])


def _placement(event: Event) -> Placement:
    """The placement that was planned: made again, with the holders that were written down."""
    facts = event.fields
    made = place(facts["domains"], facts["copies"], kind=facts["kind"])
    return replace(made, holders=tuple(tuple(others) for others in facts["holders"]))


def protection_in(run: Run, replicas: Collection[Replica], nodes_here: Collection[str]) -> str:
    """How well the run is protected, in a sentence; empty where no plan is known.

    Args:
        run: with its ledger.
        replicas: in the arenas of this machine.
        nodes_here: nodes whose arenas are on this machine.
    """
    if not (events := run.of("placement")):
        return ""
    facts = events[-1].fields
    elsewhere = sorted(set(facts["nodes"]) - set(nodes_here))
    if not elsewhere:
        return protection_of(replicas, facts["holders"], facts["nodes"], since=_since(run)).reason
    committed = run.of("committed")
    if not committed or committed[-1].at < events[-1].at:
        return f"not known here: the arenas of {len(elsewhere)} nodes are on other machines"
    step, shards = committed[-1].fields["step"], len(facts["holders"])
    return (
        f"{shards} of {shards} shards had all copies of step {step}, as the ledger says; the arenas of "
        f"{len(elsewhere)} nodes are on other machines"
    )


def _since(run: Run) -> str:
    """The version from which on nothing was missing: the one that was restored last, or the first."""
    restored = run.of("restored")
    if restored:
        return str(restored[-1].fields["version"])
    first = run.of("committed")
    return f"step {first[0].fields['step']}" if first else ""
