"""A scenario with agents in separate processes: a node, its agent, its link or the store's host is lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.soak.bounds import BOUNDS_S, deadline_s
from benchmarks.soak.evidence import commits_of, lost_steps, outcome_of, recoveries_of, times_of
from benchmarks.soak.one_node import options_of
from benchmarks.soak.processes import busy_cores, left_over
from benchmarks.soak.results import Result
from benchmarks.soak.scenario import Loss, Scenario
from benchmarks.soak.stage import Place, Undisturbed, place_for
from benchmarks.soak.watching import Watch
from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.fault_marks import FaultMarks
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.traces import read_traces
from tests.faults.cluster import Cluster, free_port
from tests.faults.counting import account_of, largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed
from tests.faults.hosts import ADDRESSES, Hosts, make_hosts

LOOK_S = 0.02
SILENCE_S = 15.0
"""Seconds until the loss of a node is detected and the others have re-rendezvoused."""
PACED = ("--samples", "360", "--pace", "0.25")


class DeadlineError(Exception):
    """Something did not happen in time."""


class Clock:
    """The remaining time of a run.

    Args:
        limit_s: seconds from now.
    """

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    def left_s(self, what: str) -> float:
        """Return the remaining seconds.

        Args:
            what: awaited event.

        Raises:
            DeadlineError: If no time remains.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError(what)
        return left

    def end_of(self, agent: psutil.Popen, what: str) -> int:
        """Wait for an agent to exit, and return its exit code.

        Raises:
            DeadlineError: If it does not exit in time.
        """
        try:
            return int(agent.wait(timeout=self.left_s(what)))
        except psutil.TimeoutExpired as error:
            raise DeadlineError(what) from error


def run(scenario: Scenario, folder: Path, parent: ForkServer, undisturbed: Undisturbed) -> Result:
    """Run a scenario and evaluate it; the arguments are those of `one_node.run`."""
    began = time.monotonic()
    with place_for(folder) as place:
        strike = _Elastic if scenario.configuration.elastic else _Fixed
        attempt = strike(scenario, place, parent, undisturbed)
        with busy_cores(scenario.load):
            attempt.run()
        leaks = left_over([pid for pid in [parent.pid] if pid is not None])
        leaks += [f"shared memory {path.name}" for path in place.arenas.iterdir()]
        result = attempt.judge(leaks)
    result = replace(result, wall_s=round(time.monotonic() - began, 2))
    if not result.good:
        return replace(result, folder=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return result


class _Fixed:
    """A fixed number of nodes: a lost one is restarted.

    Args:
        scenario: scenario to run.
        place: folders of the run.
        parent: fork server for the workers of the undisturbed run.
        undisturbed: runs to compare with.
    """

    def __init__(self, scenario: Scenario, place: Place, parent: ForkServer, undisturbed: Undisturbed) -> None:
        self.scenario, self.place = scenario, place
        self.right = undisturbed.run(scenario.configuration.undisturbed)
        parent.ready()
        self.exit_code: int | None = None
        self.missed = ""
        self.left_out: tuple[str, ...] = ()
        self.outside: tuple[str, ...] = ()
        self.hosts: Hosts | None = None
        self.ledger = place.files / "runs" / "two-nodes" / "ledger.jsonl"

    def run(self) -> None:
        """Start the nodes, lose one, restart it, and wait for the end."""
        with ExitStack() as stack:
            try:
                cluster = self._cluster(stack)
            except pytest.skip.Exception as reason:
                self.left_out, self.exit_code = (f"cut: {reason.msg}",), 0
                return
            try:
                self._train(cluster, Clock(deadline_s(self.scenario)))
            except DeadlineError as error:
                self.missed = str(error)

    def _cluster(self, stack: ExitStack) -> Cluster:
        configuration = self.scenario.configuration
        per_node = configuration.ranks // configuration.nodes
        options = replace(options_of(self.scenario, self.place), devices=per_node, num_nodes=configuration.nodes)
        words = ("--nproc-per-node", str(per_node))
        next_port = free_port() if configuration.loss is Loss.STORE_HOST else 0
        self.hosts = make_hosts(stack) if configuration.loss is Loss.LINK else None
        host = ADDRESSES[0] if self.hosts else "127.0.0.1"
        arenas = self.place.arenas
        return Cluster(self.place.files, stack, options, words=words, arena_dir=arenas, next_port=next_port, host=host)

    def _start(self, cluster: Cluster, node: int) -> psutil.Popen:
        faults = ",".join(map(str, self.scenario.injected))
        if self.hosts is not None:
            return cluster.start_agent(faults, ADDRESSES[node], env=self.hosts.env, within=self.hosts.within(node))
        return cluster.start_agent(faults, f"127.0.0.{node + 1}")

    def _train(self, cluster: Cluster, clock: Clock) -> None:
        agents = [self._start(cluster, node) for node in range(self.scenario.configuration.nodes)]
        loss = self.scenario.configuration.loss
        if loss is Loss.LINK:
            lost = self._cut(cluster, agents, clock)
        else:
            lost = 0 if loss is Loss.STORE_HOST else len(agents) - 1
            if (code := clock.end_of(agents[lost], f"the exit of node {lost}")) != -signal.SIGKILL:
                self.exit_code = code or 1
                self.missed = f"node {lost} was to be killed, but exited with code {code}"
                return
            if loss is not Loss.AGENT:
                cluster.remove_arena(agents[lost])
            if len(agents) == 1:
                # The new agent hosts the rendezvous again.
                cluster.agents.clear()
        agents[lost] = self._start(cluster, lost)
        codes = [clock.end_of(agent, f"the exit of node {node}") for node, agent in enumerate(agents)]
        self.exit_code = max(codes, key=abs)

    def _cut(self, cluster: Cluster, agents: list[psutil.Popen], clock: Clock) -> int:
        """Cut the link to the second node until its agent has exited."""
        assert self.hosts is not None
        (fault,) = self.scenario.outside
        watch = Watch(cluster.folder / "runs", self.place.commits)
        while watch.look().committed < fault.step:
            clock.left_s(f"the commit of step {fault.step}")
            time.sleep(LOOK_S)
        self.hosts.cut()
        self.outside = (str(fault),)
        clock.end_of(agents[1], "the exit of the node that is cut off")
        self.hosts.restore()
        return 1

    def judge(self, leaks: list[str]) -> Result:
        """Evaluate the run."""
        folder = self.place.files
        events = read_ledger(self.ledger).events
        verdict = None
        if self.exit_code == 0 and not self.left_out:
            collect_logs(read_traces(folder / "trace").values(), folder / "logs", since=0)
            verdict = compare(self.right.folder, folder)
        identical = bool(self.left_out) or (verdict is not None and verdict.identical)
        return self._result(
            events_lost=lost_steps(commits_of(self.place.commits), events),
            leaks=leaks,
            identical=identical,
            difference=str(verdict),
        )

    def _result(self, *, events_lost: int, leaks: list[str], identical: bool, difference: str) -> Result:
        scenario = self.scenario
        recoveries = recoveries_of(read_ledger(self.ledger).events)
        happened = FaultMarks.claimed(self.ledger.parent / "faults")
        outcome, why = outcome_of(
            exit_code=self.exit_code,
            identical=identical,
            lost=events_lost,
            leaks=leaks,
            late=times_of(recoveries, BOUNDS_S, SILENCE_S),
        )
        why = difference if outcome == "different" else f"{why} {self.missed}".strip()
        return Result(
            seed=scenario.seed,
            configuration=str(scenario.configuration),
            load=scenario.load,
            asked=scenario.faults,
            struck=(*(scenario.named(scenario.injected[index]) for index in sorted(happened)), *self.outside),
            outcome=outcome,
            why=why,
            lost_steps=events_lost,
            recoveries=tuple(recoveries),
            leaks=tuple(leaks),
            left_out=self.left_out,
        )


class _Elastic(_Fixed):
    """Three nodes, one of which is lost: the others continue with the same samples, and it rejoins.

    Weights differ from those of the undisturbed run only through the order of summation.
    """

    def __init__(self, scenario: Scenario, place: Place, parent: ForkServer, undisturbed: Undisturbed) -> None:
        self.scenario, self.place = scenario, place
        self.exit_code, self.missed, self.left_out, self.outside = None, "", (), ()
        self.words = (*PACED, *(("--sharded",) if scenario.configuration.mesh else ()))
        folder = undisturbed.folder / f"counted-{scenario.configuration.mesh or 'ddp'}"
        if not (folder / "end.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            run_undisturbed(folder, parent, scenario.configuration.ranks, *self.words)
        self.expected = account_of(folder)
        self.folder = place.files / "elastic"
        self.ledger = self.folder / "runs" / "two-nodes" / "ledger.jsonl"

    def run(self) -> None:
        """Train on three nodes, one of which is lost and rejoins."""
        (fault,) = self.scenario.injected
        with ExitStack() as stack:
            nodes = Nodes(self.folder, stack, least=2, most=3, words=self.words)
            try:
                nodes.lose_and_rejoin(int(fault.rank), str(fault), of=3, left=2)
                self.exit_code = 0
            except (AssertionError, psutil.TimeoutExpired) as error:
                self.missed = str(error)[-500:]

    def judge(self, leaks: list[str]) -> Result:
        """Evaluate the run."""
        ended = (self.folder / "end.json").exists()
        found = account_of(self.folder)
        same_samples = ended and found.steps == self.expected.steps
        apart = largest_difference(self.expected, found) if ended else float("inf")
        difference = json.dumps({"the same samples": same_samples, "weights differ by": apart})
        leaks += [f"shared memory {path.name}" for path in (self.folder / "arenas").iterdir()]
        return self._result(events_lost=0, leaks=leaks, identical=same_samples and apart < BOUND, difference=difference)
