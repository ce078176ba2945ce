"""Time limits of recoveries and runs; a run that exceeds its limit hangs."""

from __future__ import annotations

from benchmarks.soak.evidence import DURABLE, IN_PLACE, RELAUNCH, STORAGE
from benchmarks.soak.scenario import SILENT, OutsideKind, Scenario
from lightning_ckptless.protocol.fault_script import Moment
from lightning_ckptless.protocol.hang_detection import IDLE_S, RELEASE_S

BOUNDS_S = {IN_PLACE: 20.0, RELAUNCH: 60.0, DURABLE: 60.0, STORAGE: 60.0}
"""Seconds from the detection of a fault to the end of the first step of all ranks, by kind of recovery."""
NODE_LOST_S = 15.0
"""Seconds until the loss of a node is detected and the others have re-rendezvoused."""
LEARNED_HANG_S = 30.0
"""Longest silence before a hang is detected with a learned timeout: 10 s, or more if steps were slow."""
START_S = 90.0
NODES_S = 120.0
"""Additional seconds for a scenario with several agents: missed heartbeats and re-rendezvous."""
NOT_SILENT_S = 2.0
AT_THE_SAME_POINT = frozenset({Moment.VALIDATION, Moment.EPOCH_END})
"""Moments at which no other rank may be ahead of a hung one, which is then detected because it is idle."""


def bounds_s(scenario: Scenario) -> dict[str, float]:
    """Return the bounds of a scenario in seconds, by kind of recovery.

    A rank that is silent during another fault or its recovery is replaced if it has not released its process groups
    within `RELEASE_S`.
    """
    injected = any(fault.kind in SILENT for fault in scenario.injected)
    outside = any(fault.kind is OutsideKind.STOP for fault in scenario.outside)
    more_s = RELEASE_S if injected or outside else 0.0
    return {rung: bound_s + more_s for rung, bound_s in BOUNDS_S.items()}


def silent_s(scenario: Scenario) -> float:
    """Return the longest time in seconds until a silent fault of a scenario is detected."""
    if scenario.configuration.loss is not None:
        return NODE_LOST_S
    limit_s = scenario.configuration.hang_timeout_s
    if limit_s is not None:
        return limit_s + NOT_SILENT_S
    last = any(fault.kind in SILENT and fault.at in AT_THE_SAME_POINT for fault in scenario.injected)
    return LEARNED_HANG_S + (IDLE_S if last else 0.0)


def deadline_s(scenario: Scenario) -> float:
    """Return the longest time in seconds that a run may take."""
    faults = len(scenario.faults)
    silent = sum(fault.kind in SILENT for fault in scenario.injected)
    silent += sum(fault.kind is OutsideKind.STOP for fault in scenario.outside)
    relaunched = sum(fault.kind is OutsideKind.FORK_SERVER for fault in scenario.outside)
    relaunched += sum(fault.rank == "all" for fault in scenario.injected)
    nodes_s = NODES_S if scenario.configuration.nodes > 1 else 0.0
    return (
        START_S
        + nodes_s
        + faults * BOUNDS_S[IN_PLACE] / 2
        + silent * silent_s(scenario)
        + relaunched * BOUNDS_S[RELAUNCH]
    )
