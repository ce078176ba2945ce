"""How long a replacement took to reach `fit`, and what would make the next one faster.

| The modules that the script imports | The next replacement |
|---|---|
| `off`: are not preloaded | would find them imported with `preload_imports=True` |
| `waiting`, `importing`: are not preloaded yet | finds them imported |
| `ready`: were preloaded | runs the same code before `fit` |
| `given up`: cannot be preloaded | imports them again |

In each case, a standby does all of this before it is needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

SLOW_S = 1.0
"""Duration in seconds above which a regroup is explained to the user."""
_MANY_MODULES = 20


class Imports(StrEnum):
    """A node's progress in preloading the modules of the script for new processes."""

    OFF = "off"
    WAITING = "waiting"
    IMPORTING = "importing"
    READY = "ready"
    GIVEN_UP = "given up"


_NEXT = {
    Imports.OFF: "preload_imports=True or standbys=1 avoids that",
    Imports.WAITING: "the next one finds them imported; standbys=1 avoids the rest",
    Imports.IMPORTING: "the next one finds them imported; standbys=1 avoids the rest",
    Imports.READY: "standbys=1 avoids that",
    Imports.GIVEN_UP: "standbys=1 avoids that",
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """The startup of a replacement.

    Args:
        startup_s: seconds from the request for it until it reached the training loop.
        modules: number of modules that it imported during startup.
        imports: its node's progress in preloading modules when it was started.
    """

    startup_s: float
    modules: int
    imports: Imports


def why_slow(regroup_s: float, arrivals: Collection[Arrival]) -> str:
    """Why the regroup took long and what would help, in a sentence.

    Args:
        regroup_s: seconds from the detection of the fault until all ranks had completed the rendezvous.
        arrivals: startups of the replacements.

    Returns:
        The explanation; empty if the regroup was fast, or slow for another reason.
    """
    last = max(arrivals, key=lambda arrival: arrival.startup_s, default=None)
    if last is None or regroup_s <= SLOW_S or last.startup_s < regroup_s / 2:
        return ""
    startup = f"{last.startup_s:.1f} s of it for a new process to reach fit"
    if last.modules < _MANY_MODULES:
        return f"{startup}, spent in the script before fit: standbys=1 avoids that"
    return f"{startup}, importing {last.modules} modules: {_NEXT[last.imports]}"
