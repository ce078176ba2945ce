"""What has to hold once a simulated run has ended; `World` checks the rest while it proceeds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import fsum, isclose

from lightning_ckptless.protocol.recovery import WorkerState
from tests.simulation.world import World

_ROUNDED_S = 1e-4
"""The ledger has rounded values."""
_DETECTED_S = 0.2
"""A process may die while the others make the step that ends the recovery from the fault before."""


def all_ranks_have_finished(world: World) -> None:
    """Every rank has made all steps and has exited, and its agent has ended."""
    newest = world.members()
    assert newest, "no rank is left"
    ranks = {process.rank for process in newest}
    # Those of a node that is lost after their last step, while the others leave the training loop, are not needed.
    done = {process.rank for process in world.newest().values() if process.step == world.steps}
    assert len(newest) == len(ranks), "several processes have one rank"
    assert set(range(max(ranks) + 1)) <= ranks | done, "ranks are missing"
    codes = {str(process): None if process.end is None else process.end.exit_code for process in newest}
    assert set(codes.values()) == {0}, f"exit codes: {codes}"
    assert all(process.finished for process in newest), "a process has exited before its `fit` has returned"
    assert all(node.is_over for node in world.nodes.values() if node.has_trained), "an agent does not end"


def all_ranks_agree(world: World) -> None:
    """Every rank ends in the same generation, with the same version, outside of the training loop."""
    newest = world.members()
    assert {process.step for process in newest} == {world.steps}, [process.step for process in newest]
    assert len({process.generation for process in newest}) == 1, [process.generation for process in newest]
    states = {world.state_of(process) for process in newest}
    assert states == {WorkerState.OUTSIDE}, states


def time_is_accounted_for(world: World) -> None:
    """The accounts of the run contain every second of it once, and so do the phases of each recovery."""
    began, until = 0.0, 0.0
    for at, event, noted in world.recorded:
        if event == "time_spent":
            spent_s = fsum(noted["seconds"].values())
            assert isclose(spent_s, noted["until"] - noted["began_at"], abs_tol=_ROUNDED_S), noted
            assert min(noted["seconds"].values(), default=0.0) >= 0.0, noted
            assert noted["began_at"] == began, f"a process has another beginning of the run: {noted}"
            assert until <= noted["until"] <= at + _ROUNDED_S, f"the account ends at {noted['until']}, not {at}"
            until = noted["until"]
        elif event == "recovery":
            phases = noted["phases"].values()
            assert min(phases) >= 0.0, noted
            assert isclose(fsum(phases), noted["total_s"], abs_tol=_ROUNDED_S), noted
            assert noted["total_s"] <= at + _ROUNDED_S, f"a recovery of {noted['total_s']} s at {at}"
        elif event == "run_ended":
            assert 0.0 <= noted["goodput"] <= 1.0, noted
            assert isclose(noted["wall_s"], at, abs_tol=_ROUNDED_S), noted
    # Twice, if a fault strikes after the first report: no step is replayed then.
    assert world.events("run_ended"), "the end of the run is not reported"


def recoveries_do_not_overlap(world: World) -> None:
    """Each recovery begins after the one before it has ended, and rank 0 counts all that the ledger has."""
    recoveries = [(at, noted) for at, event, noted in world.recorded if event == "recovery"]
    for (ended_at, _), (at, noted) in pairwise(recoveries):
        began_at = at - noted["total_s"]
        assert began_at >= ended_at - _DETECTED_S, f"one ends at {ended_at}, the next begins at {began_at}: {noted}"
    count, deaths = (
        world.events("run_ended")[-1]["recoveries"],
        sum(process.rank == 0 for process in world.processes) - 1,
    )
    # A process of rank 0 that dies just after a commit has not reported it, but the version shows it.
    most = len(recoveries) + deaths
    assert len(recoveries) <= count <= most, f"rank 0 counts {count} recoveries, the ledger has {len(recoveries)}"


INVARIANTS: tuple[Callable[[World], None], ...] = (
    all_ranks_have_finished,
    all_ranks_agree,
    time_is_accounted_for,
    recoveries_do_not_overlap,
)
