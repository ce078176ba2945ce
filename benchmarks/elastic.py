"""One of four nodes is killed, the others continue without it, and it rejoins: how long training pauses.

Four agents of one CPU rank each run on loopback with `--nnodes 3:4`. Repeatedly, the agent of a node and its worker are
killed and its shared memory is removed; another agent is started in its place once the others continue. The first node,
with rank 0, is never killed. Takes ten minutes.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.benchmark import Benchmark, Results, Steps, console, option
from benchmarks.harness.processes import Command, Scratch, ckptless_run, job_environment, scratch
from benchmarks.harness.scenario import OURS
from benchmarks.harness.table import Column, Group, Table, count_of, each, p95
from benchmarks.harness.watch import START_S
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger
from lightning_ckptless.replica.arena import find_arenas

NODES = 4
TIMEOUT_S, LOOK_S = 120.0, 0.1
SPARE_STEPS = 10
"""Steps that the job makes after a change before the next event."""
RANDOM_STEPS = 50
SETUPS: dict[str, tuple[JobOptions, tuple[str, ...]]] = {
    "DDP, in place": (OURS, ()),
    "DDP, --no-in-place": (OURS, ("--no-in-place",)),
    "FSDP2, in place": (OURS.but(sharded=True), ()),
}
"""What is trained, and flags of `ckptless run`."""
MARKS = {"noticed_s": "node_lost", "met_s": "move", "told_s": "fault", "restored_s": "restored"}
"""Moments of a loss, and the events that the ledger recorded first at each."""
LOSS_PHASES = ("notice", "meet", "tell the workers", "regroup and restore", "first step")
Found = dict[str, Any]
T = TypeVar("T")


class NodesLostError(RuntimeError):
    """An awaited event did not occur."""


class Step(NamedTuple):
    """A step that all ranks of its world have finished, and when the last of them did."""

    attempt: int
    number: int
    world: int
    at: float


def finished(rows: Iterable[Found]) -> list[Step]:
    """Return the steps that all ranks of their world have finished, by time; replayed steps occur twice."""
    ranks: dict[tuple[int, int, int], dict[int, float]] = {}
    for row in rows:
        ranks.setdefault((row["attempt"], row["step"], row["world"]), {})[row["rank"]] = row["at"]
    whole = [Step(*key, max(at.values())) for key, at in ranks.items() if len(at) == key[2]]
    return sorted(whole, key=lambda step: step.at)


def first_of(steps: Sequence[Step], world: int, *, after: float) -> Step | None:
    """Return the first step that `world` ranks finished after a moment."""
    return next((step for step in steps if step.world == world and step.at > after), None)


class Nodes:
    """The nodes of a job. They end with the stack."""

    def __init__(self, setup: str, stack: ExitStack, place: Scratch, name: str) -> None:
        job, self._flags = SETUPS[setup]
        self.folder = place.files / name
        self.folder.mkdir()
        self._job = job.but(nodes=NODES, devices=1, root=str(self.folder))
        self._arenas, self._stack = place.arenas, stack
        self._rows: list[Found] = []
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._inbox = stack.enter_context(Inbox(place.files / f"{name}.socket"))
        self._nodes: dict[int, Command] = {}

    def start(self, number: int) -> float:
        """Start a node; ranks are in the order of nodes. Returns the wall clock time of the start."""
        folder = self.folder / f"node-{number}-{time.monotonic_ns()}"
        folder.mkdir()
        # The benchmark itself hosts the rendezvous, so that any node may be lost.
        launcher = ckptless_run(
            f"--nnodes={NODES - 1}:{NODES}", "--rdzv-id=elastic", "--rdzv-conf=is_host=no",
            f"--rdzv-endpoint=127.0.0.1:{self._store.port}", f"--local-addr=127.0.0.{number + 1}", *self._flags,
        )  # fmt: skip
        places = {environment.RUN_ROOT: str(self.folder / "runs"), environment.ARENA_DIR: str(self._arenas)}
        node = Command(launcher(self._job), folder, {**job_environment(self._inbox.path), **places})
        self._nodes[number] = self._stack.enter_context(node)
        return node.began_at

    def kill(self, number: int) -> float:
        """SIGKILL a node's agent and its workers, and remove its shared memory. Returns the wall clock time."""
        node = self._nodes.pop(number)
        killed_at = time.time()
        node.end(grace_s=0.0)
        for info in find_arenas(self._arenas):
            if info.owner.pid == node.pid:
                shutil.rmtree(info.path)
        return killed_at

    @property
    def steps(self) -> list[Step]:
        """The steps that all ranks have finished so far."""
        return finished(self._rows)

    def until(self, reached: Callable[[list[Step]], T | None], timeout_s: float, awaited: str) -> T:
        """Follow the job until `reached` returns a value.

        Raises:
            NodesLostError: If it does not in time, or a node has ended.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := reached(self.steps)):
            if time.monotonic() > deadline or not all(node.running for node in self._nodes.values()):
                output = "\n".join(f"node {number}:\n{node.output_tail(6)}" for number, node in self._nodes.items())
                raise NodesLostError(f"{awaited} not reached within {timeout_s:g} s, or a node ended:\n{output}")
            look_until = time.monotonic() + LOOK_S
            while (note := self._inbox.next(max(0.0, look_until - time.monotonic()))) is not None:
                if note.moment == "step":
                    self._rows.append({"at": note.at, **note.fields})
        return found


# ---------------------------------------------------------------------- measurement


def cycle(nodes: Nodes, victim: int, chance: random.Random) -> Found:
    """Kill a node, wait until the others continue, start it again, and wait until all continue.

    Raises:
        NodesLostError: If the others, or later all nodes, do not continue.
    """

    def until_made(world: int, count: int, timeout_s: float = START_S) -> None:
        """Wait until the last `count` steps were made by a world of this size."""

        def made(steps: list[Step]) -> bool:
            return len(steps) >= count and all(step.world == world for step in steps[-count:])

        nodes.until(made, timeout_s, f"{count} steps of {world} ranks")

    def first_step(world: int, since: float) -> Step:
        return nodes.until(lambda steps: first_of(steps, world, after=since), TIMEOUT_S, f"a step of {world} ranks")

    until_made(NODES, SPARE_STEPS + chance.randrange(RANDOM_STEPS))
    killed_at = nodes.kill(victim)
    small = first_step(NODES - 1, killed_at)
    until_made(NODES - 1, SPARE_STEPS, TIMEOUT_S)
    came_at = nodes.start(victim)
    full = first_step(NODES, came_at)
    shrink, grow = shrunk(nodes.steps, killed_at, small), grown(nodes.steps, came_at, full)
    return {"killed_at": killed_at, "came_at": came_at, "shrink": shrink, "grow": grow}


def shrunk(steps: list[Step], killed_at: float, small: Step) -> Found:
    """Return the cost of losing a node, given all finished steps and the first one of the remaining nodes."""
    before = [step for step in steps if step.at < killed_at][-SPARE_STEPS:]
    return {
        "seconds": small.at - killed_at,
        "step_s": median(after.at - at.at for at, after in pairwise(before)),
        "repeated_steps": before[-1].number + 1 - small.number,
    }


def grown(steps: list[Step], came_at: float, full: Step) -> Found:
    """Return the cost of a node's return to the others, given all finished steps and the first one of all nodes."""
    last = [step for step in steps if step.at < full.at][-1]
    return {
        "paused_s": full.at - last.at,
        "seconds": full.at - came_at,
        "repeated_steps": last.number + 1 - full.number,
    }


def add_marks(cycles: list[Found], events: Sequence[Event]) -> None:
    """Add to every loss the first of each event in `MARKS` that the ledger recorded before the node rejoined."""
    for found in cycles:
        killed_at = found["killed_at"]
        meanwhile = [event for event in events if killed_at < event.at < found["came_at"]]
        for mark, name in MARKS.items():
            within = [event.at - killed_at for event in meanwhile if event.event == name]
            found["shrink"] |= {mark: min(within)} if within else {}


# ---------------------------------------------------------------------- tables


def phase(name: str) -> Callable[[Group], list[float]]:
    """Return the function for the time of a phase of each loss, from the moments that the ledger recorded."""
    place = LOSS_PHASES.index(name)

    def seconds(group: Group) -> list[float]:
        losses = [[0.0, *(lost.get(mark) for mark in MARKS), lost["seconds"]] for lost in group.items]
        return [moments[place + 1] - moments[place] for moments in losses if None not in moments]

    return seconds


REPLAYED = (
    Column("steps replayed p50", each("repeated_steps"), "g", median),
    Column("max", each("repeated_steps"), "g", max),
)
SHRINK = (
    Column("how", 0),
    Column("kills", count_of),
    Column("p50 s", each("seconds"), ".2f", median),
    Column("p95 s", each("seconds"), ".2f", p95),
    Column("max s", each("seconds"), ".2f", max),
    Column("one step s", each("step_s"), ".2f", median),
    *REPLAYED,
    *(Column(f"{name} s", phase(name), ".2f", median) for name in LOSS_PHASES),
)
SHRINK_NOTE = (
    "A node whose agent's connection was closed is lost after at least 1 s without a heartbeat, any other after the "
    "limit (the defaults) plus one interval. Phases: medians. notice: from the kill until another agent considers the "
    "node lost (the ledger's `node_lost`). meet: until the agents have re-rendezvoused. tell the workers: until they "
    "receive their new ranks. first step: replay included."
)
GROW = (
    Column("how", 0),
    Column("returns", count_of),
    Column("others paused p50 s", each("paused_s"), ".2f", median),
    Column("max s", each("paused_s"), ".2f", max),
    Column("agent start to a step of all p50 s", each("seconds"), ".2f", median),
    Column("max s", each("seconds"), ".2f", max),
    *REPLAYED,
)


@dataclass
class Elastic(Benchmark):
    repeats: int = option(3, "kills of each setup", quick=1)
    only: tuple[str, ...] = option((), "setups", choices=tuple(SETUPS))

    def measure(self, results: Results, steps: Steps) -> None:
        chance, names = random.Random(1), self.only or tuple(SETUPS)
        results["setups"] = {}
        steps.expect(self.repeats * len(names))
        for name in names:
            steps.begin(name)
            found: Found = {"cycles": [], "failed": ""}
            results["setups"][name] = found
            with scratch() as place, ExitStack() as stack:
                nodes = Nodes(name, stack, place, "job")
                try:
                    for node in range(NODES):
                        nodes.start(node)
                    for repeat in range(self.repeats):
                        found["cycles"].append(cycle(nodes, 1 + repeat % (NODES - 1), chance))
                        steps.done()
                except NodesLostError as error:
                    console.print(f"{name}: {error}", markup=False)
                    found["failed"] = str(error)
                for ledger in nodes.folder.glob(f"runs/*/{LEDGER_NAME}"):
                    add_marks(found["cycles"], read_ledger(ledger).events)

    def tables(self, results: Results) -> list[Table]:
        setups: dict[str, Found] = results["setups"]
        losses, returns = (
            [Group(setup, [cycle[kind] for cycle in found["cycles"]]) for setup, found in setups.items()]
            for kind in ("shrink", "grow")
        )
        failed = [f"{name}: {found['failed'].splitlines()[0]}" for name, found in setups.items() if found["failed"]]
        kill = "A node of four is killed, to the first step finished by all of the other three"
        paused = "Paused: from the last step of three ranks to the first of four, slowest rank."
        return [
            Table.of(kill, losses, *SHRINK, notes=[SHRINK_NOTE, *failed]),
            Table.of("The node rejoins", returns, *GROW, notes=[paused]),
        ]


if __name__ == "__main__":
    Elastic.main()
