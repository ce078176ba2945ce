"""Regroupings: numbers under which survivors and replacements regroup after a fault, the same on all nodes.

The agents of a run write them into their workers' store. The agent that sees a fault first opens the next number; an
agent that sees one meanwhile adopts it. All ranks regroup under a number, survivors and replacements, and a further
fault in between opens another one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.membership.channel.fault_report import FaultReport

_KEY = "ckptless/regrouping"


@dataclass(frozen=True, slots=True)
class Regrouping:
    """One regrouping.

    Args:
        number: grows with each, in one round of the rendezvous.
        fault: fault that opened it.
    """

    number: int
    fault: FaultReport


class Regroupings:
    """The regroupings of one round of the rendezvous, as one agent sees them.

    Args:
        store: store that all agents of the round share.
        nodes: number of nodes.
        number: number of the last completed regrouping.

    Attributes:
        number: the last number that this agent knows.
    """

    def __init__(self, store: Store, nodes: int, number: int = 0) -> None:
        self.number = number
        self._store = store
        self._is_shared = nodes > 1
        self._seen = ""

    @property
    def is_shared(self) -> bool:
        """Whether there are other nodes."""
        return self._is_shared

    def open(self, fault: FaultReport) -> Regrouping:
        """Open the next number for a fault, or adopt the one that another agent has opened meanwhile."""
        mine = json.dumps({"number": self.number + 1, "fault": asdict(fault)})
        return self._take(self._store.compare_set(_KEY, self._seen, mine).decode())

    def news(self) -> Regrouping | None:
        """Return the regrouping that another agent has opened, if it is new."""
        if not self._is_shared:
            return None
        try:
            text = self._store.get(_KEY).decode() if self._store.check([_KEY]) else self._seen
        except DistError:
            # The store was lost with its node, which heartbeats and the rendezvous detect. It is not queried again.
            self._is_shared = False
            return None
        return self._take(text) if text != self._seen else None

    def _take(self, text: str) -> Regrouping:
        found = json.loads(text)
        self._seen, self.number = text, found["number"]
        return Regrouping(found["number"], FaultReport(**found["fault"]))
