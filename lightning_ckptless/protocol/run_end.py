"""What is kept when a run ends, and how to continue the run.

| The run | And | Its shared memory |
|---|---|---|
| finished, or failed by an error of its script | | removed |
| was stopped by a signal | a run id was given, under which it can be restarted | kept |
| was stopped by a signal | no run id was given | removed |
| gave up: too many recoveries, or a script that cannot be restarted | | kept |

If no version was committed, or if the slots were anonymous memory of the agent, there is nothing to keep. A durable
state is kept in every case, and the run can be continued from it as well.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended on a node, and what remains of it there.

    Args:
        is_asked_for: whether a signal stopped the run.
        has_given_up: whether the run gave up because of its nodes or environment, not because of its script.
        is_named: whether the user passed a run id.
        committed: the newest version in this node's shared memory, as text; empty if there is none.
        durable: the newest durable state, as text; empty if there is none.
        command: command that restarts the run.
        was_in_agent: whether versions were in the agent's memory, which is released when the agent exits.
    """

    is_asked_for: bool
    has_given_up: bool
    is_named: bool
    committed: str
    durable: str
    command: str
    was_in_agent: bool = False


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What to do with a run that has ended.

    Args:
        keeps_arenas: whether its shared memory is kept.
        text: message for the user; empty if there is nothing to report.
    """

    keeps_arenas: bool
    text: str = ""


def conclude(outcome: RunOutcome) -> Conclusion:
    """Decide what is kept of a run, and tell the user how to continue it."""
    if not (outcome.is_asked_for or outcome.has_given_up):
        return Conclusion(keeps_arenas=False)
    if outcome.committed and (outcome.is_named or outcome.has_given_up):
        text = f"{outcome.committed} is kept in shared memory; continue with: {outcome.command}"
        return Conclusion(keeps_arenas=True, text=text)
    if outcome.durable:
        return Conclusion(keeps_arenas=False, text=f"{outcome.durable} is kept; continue with: {outcome.command}")
    if not outcome.committed and outcome.was_in_agent:
        text = "no state is kept: it was in the agent's memory, because it did not fit into the arena folder"
        return Conclusion(keeps_arenas=False, text=text)
    if not outcome.committed:
        return Conclusion(keeps_arenas=False, text="no state is kept: no step was committed")
    return Conclusion(
        keeps_arenas=False,
        text=f"{outcome.committed} is not kept: no run id was given. Start the run with "
        "`ckptless run --rdzv-id NAME` to keep its state when it is stopped",
    )
