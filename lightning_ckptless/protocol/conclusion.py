"""What stays of a run that is over, and how it is continued.

| The run | And | Its shared memory |
|---|---|---|
| has ended well, or by its program | | removed |
| was asked to end by a signal | was given a name, under which it can be started again | kept |
| was asked to end by a signal | was given none | removed |
| has given up: too many recoveries, or a program that cannot be started again | | kept |

Where no version was committed there is nothing to keep, nor where the slots were memory of the agent, which has ended.
A durable state stays in any case, and is a place to continue from as well.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run has ended on a node, and what is left of it there.

    Args:
        is_asked_for: by a signal.
        has_given_up: for a fault of its machines or their surroundings, not by its program.
        is_named: its user has given it a name.
        committed: the newest version in this node's shared memory, in words; empty where there is none.
        durable: the newest durable state, in words; empty where there is none.
        command: what starts it again.
        was_in_agent: whether versions were in memory of the agent, which ends with it.
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
    """What is done with a run that is over.

    Args:
        keeps_arenas: whether its shared memory stays.
        text: message for the user; empty where there is nothing to say.
    """

    keeps_arenas: bool
    text: str = ""


def conclude(ending: Ending) -> Conclusion:
    """Decide what stays of a run, and say how it is continued."""
    if not (ending.is_asked_for or ending.has_given_up):
        return Conclusion(keeps_arenas=False)
    if ending.committed and (ending.is_named or ending.has_given_up):
        text = f"{ending.committed} is kept in shared memory; continue with: {ending.command}"
        return Conclusion(keeps_arenas=True, text=text)
    if ending.durable:
        return Conclusion(keeps_arenas=False, text=f"{ending.durable} is kept; continue with: {ending.command}")
    if not ending.committed and ending.was_in_agent:
        text = "no state is kept: it was in memory of the agent, since the folder of the arenas was too small for it"
        return Conclusion(keeps_arenas=False, text=text)
    if not ending.committed:
        return Conclusion(keeps_arenas=False, text="no state is kept: no step had been committed")
    return Conclusion(
        keeps_arenas=False,
        text=f"{ending.committed} is not kept: the run was given no name. `ckptless run --rdzv-id NAME` starts one "
        "whose state is kept when it is asked to end",
    )
