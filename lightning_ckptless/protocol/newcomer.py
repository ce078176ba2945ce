"""How a new process came to the place of a lost rank, and what would bring the next one there sooner.

| What the program imports | So the next process |
|---|---|
| `off`: is not imported for new processes | would find it imported with `preload_imports=True` |
| `waiting`, `importing`: is not imported yet | finds it imported |
| `ready`: was imported already | runs the same head of the script |
| `given up`: cannot be imported for them | imports it as well |

In each case a standby has done all of it before it is needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

SLOW_S = 1.0
"""A regrouping that takes longer deserves a word."""
_MANY_MODULES = 20


class Imports(StrEnum):
    """How far a node is with importing, for new processes, what the program imports."""

    OFF = "off"
    WAITING = "waiting"
    IMPORTING = "importing"
    READY = "ready"
    GIVEN_UP = "given up"


_NEXT = {
    Imports.OFF: "preload_imports=True or standbys=1 would avoid that",
    Imports.WAITING: "the next one finds them imported, and standbys=1 would have avoided that, too",
    Imports.IMPORTING: "the next one finds them imported, and standbys=1 would have avoided that, too",
    Imports.READY: "standbys=1 would avoid that",
    Imports.GIVEN_UP: "standbys=1 would avoid that",
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """The way of a new process from its start to the others.

    Args:
        way_s: seconds from when it was asked for until it stood at the training loop.
        modules: installed modules that it has imported on the way.
        imports: how far its node was with importing them, when it was started.
    """

    way_s: float
    modules: int
    imports: Imports


def why_slow(regroup_s: float, arrivals: Collection[Arrival]) -> str:
    """Why the ranks took long to come together, and what would help, in a sentence.

    Args:
        regroup_s: seconds from the news of the fault until all ranks had met.
        arrivals: of the new processes among them.

    Returns:
        Empty where it did not take long, or not for a new process.
    """
    last = max(arrivals, key=lambda arrival: arrival.way_s, default=None)
    if last is None or regroup_s <= SLOW_S or last.way_s < regroup_s / 2:
        return ""
    way = f"{last.way_s:.1f} s of it on the way of a new process to fit"
    if last.modules < _MANY_MODULES:
        return f"{way}, in what the script does before that: standbys=1 would avoid that"
    return f"{way}, where it imported {last.modules} modules: {_NEXT[last.imports]}"
