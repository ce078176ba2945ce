"""What the events of a ledger add up to. Its size does not grow with the run, so that a long one can be watched."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_ckptless.cli.time_spent import RunTime, run_time
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.draining import DrainAction
from lightning_ckptless.protocol.placement import Placement, place
from lightning_ckptless.protocol.placement_table import PlacementTable, table_of

_MOST_RECOVERIES = 50
_MOST_STEPS = 600
"""Committed steps are recorded at most once a second: these are ten minutes or more."""
_FAULTS = ("fault", "raised", "node_lost")
_TIMED = ("agent_started", "agent_ended", "fault", "time_spent")
"""Events from which the time of a run is accounted. The interval between notes of time grows with the run."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node as its agent has recorded it.

    Args:
        name: unique in the run.
        host: name of the host.
        agent: process id of its agent.
        folder: the agent's folder, in which the workers write their progress.
        spawned_at: when its workers were started, in seconds since the epoch.
        pids: process id of each rank's newest worker.
    """

    name: str
    host: str
    agent: int
    folder: Path
    spawned_at: float
    pids: dict[int, int]


class History:
    """The events of a run so far.

    Attributes:
        newest: the newest event of each name.
        first: the first event of each name.
        counts: number of events of each name.
        generation: number of the generation; None before the first.
        nodes: the nodes, by name.
        plan: the newest placement as tables; None without copies, or before the first placement.
        faults: the last events that report a fault.
        recoveries: the last recoveries.
        draining: what is being drained, in a sentence, by node and rank; the rank is None for a node.
        steps: the last committed steps, with their times in seconds since the epoch.
        last_at: time of the newest event in seconds since the epoch; None before the first.
    """

    def __init__(self) -> None:
        self.newest: dict[str, Event] = {}
        self.first: dict[str, Event] = {}
        self.counts: Counter[str] = Counter()
        self.generation: int | None = None
        self.nodes: dict[str, Node] = {}
        self.plan: PlacementTable | None = None
        self.faults: deque[Event] = deque(maxlen=_MOST_RECOVERIES)
        self.recoveries: deque[Event] = deque(maxlen=_MOST_RECOVERIES)
        self.draining: dict[tuple[str, int | None], str] = {}
        self.steps: deque[tuple[float, int]] = deque(maxlen=_MOST_STEPS)
        self.last_at: float | None = None
        self._timed: list[Event] = []
        self._rank_times: dict[int | None, Event] = {}
        self._time: RunTime | None = None

    def add(self, event: Event) -> None:
        """Add the next event of the ledger."""
        if event.event == "run_started":
            self._forget_earlier_fit(event)
        self.newest[event.event] = event
        self.first.setdefault(event.event, event)
        self.counts[event.event] += 1
        self.last_at = event.at if self.last_at is None else max(self.last_at, event.at)
        # A rank that is drained is lost on purpose.
        if event.event in _FAULTS and event.fields.get("kind") != "drained":
            self.faults.append(event)
        self._add_time(event)
        self._add_drain(event)
        match event.event:
            case "workers_spawned":
                self._add_node(event)
            case "in_place":
                self._replace_workers(event)
            case "run_started":
                self._enter_generation(event)
            case "recovery":
                self._enter_generation(event)
                self.recoveries.append(event)
            case "placement":
                self.plan = _plan(event)
            case "committed":
                self.steps.append((event.at, event.fields["step"]))

    @property
    def time(self) -> RunTime | None:
        """Where the time went, up to the newest event that reports it; None before the first event."""
        if self._time is None and self._timed:
            self._time = run_time([*self._timed, *self._rank_times.values()])
        return self._time

    def _add_time(self, event: Event) -> None:
        if event.event == "rank_time":
            self._rank_times[event.rank] = event
        elif event.event in (*_TIMED, "run_ended") or not self._timed:
            self._timed.append(event)
        else:
            return
        self._time = None

    def _add_drain(self, event: Event) -> None:
        fields = event.fields
        match event.event:
            case "drain" if fields["action"] != DrainAction.REFUSE:
                self.draining[fields["node"], fields.get("drained_rank")] = f"{fields['reason']} ({fields['cause']})"
            case "drained" | "drain_given_up" | "node_drained":
                self.draining.pop((fields["node"], fields.get("drained_rank")), None)
            case "run_ended":
                self.draining.clear()

    def _enter_generation(self, event: Event) -> None:
        self.generation = max(self.generation or 0, event.generation or 0)

    def _forget_earlier_fit(self, started: Event) -> None:
        """Forget what was committed in another arena: every `fit` of a script has its own, and counts its own steps."""
        before = self.newest.get("run_started")
        if before is not None and before.fields["arena"] != started.fields["arena"]:
            self.steps.clear()
            self.plan = None
            for name in ("committed", "placement"):
                self.newest.pop(name, None)

    def _add_node(self, event: Event) -> None:
        fields = event.fields
        pids = {int(rank): pid for rank, pid in fields["pids"].items()}
        self.nodes[fields["node"]] = Node(
            fields["node"], fields["host"], fields["agent"], Path(fields["folder"]), event.at, pids
        )

    def _replace_workers(self, event: Event) -> None:
        for rank, (pid, _) in event.fields["new"].items():
            for node in self.nodes.values():
                if int(rank) in node.pids:
                    node.pids[int(rank)] = pid

    @property
    def arena_dir(self) -> Path | None:
        """Folder of the arenas, as reported by the workers; None before they have."""
        started = self.newest.get("run_started")
        return None if started is None else Path(started.fields["arena"]).parent

    def is_newest(self, name: str, *others: str) -> bool:
        """Whether an event of a name has occurred, and none of the others has occurred since."""
        found = self.newest.get(name)
        later = (self.newest[other].at for other in others if other in self.newest)
        return found is not None and all(found.at >= at for at in later)


def _plan(event: Event) -> PlacementTable | None:
    facts = event.fields
    if not facts["copies"]:
        return None
    return table_of(_placement(event), facts["sizes_bytes"], kind=facts["kind"], slots=facts.get("slots", 2))


def _placement(event: Event) -> Placement:
    """Rebuild the recorded placement, with the recorded holders."""
    facts = event.fields
    made = place(facts["domains"], facts["copies"], kind=facts["kind"])
    return replace(made, holders=tuple(tuple(others) for others in facts["holders"]))
