"""A scenario with agents in separate processes: a node, its agent, its link or the store's host is lost."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.ledger import LEDGER_NAME, read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.fault_marks import FaultMarks
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.trace_reader import read_traces
from lightning_ckptless.testing.variant import Variant
from tests.faults.cluster import Cluster, free_port
from tests.faults.counting import Account, account_of, largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed
from tests.faults.hosts import ADDRESSES, Hosts, make_hosts
from tests.soak.judge import Evidence, deadline_s, lost_steps
from tests.soak.one_node import options_of
from tests.soak.outside import Watch, commits_of
from tests.soak.scenario import Loss, Scenario
from tests.soak.stage import Place, Undisturbed

LOOK_S = 0.02
PACED = ("--samples", "360", "--pace", "0.25")


def prepare(scenario: Scenario, place: Place, parent: ForkServer, undisturbed: Undisturbed) -> Callable[[], Evidence]:
    """Make the undisturbed run, and return the function that makes the run with faults."""
    if not scenario.configuration.elastic:
        right = undisturbed.run(scenario.configuration.undisturbed)
        return lambda: lose_node(scenario, place, right)
    words = (*PACED, *(("--sharded",) if scenario.configuration.mesh else ()))
    folder = undisturbed.folder / f"counted-{scenario.configuration.mesh or 'ddp'}"
    if not (folder / "end.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_undisturbed(folder, parent, scenario.configuration.ranks, *words)
    return lambda: lose_elastic_node(scenario, place, account_of(folder), words)


# ---------------------------------------------------------------------- a fixed number of nodes


class NotAsExpectedError(Exception):
    """Something did not happen in time, or otherwise than it should; `exit_code` is None if it was not in time."""

    def __init__(self, what: str, exit_code: int | None = None) -> None:
        super().__init__(what)
        self.exit_code = exit_code


@dataclass
class FixedNodes:
    """A fixed number of nodes: a lost one is started again.

    Args:
        scenario: scenario to run.
        place: folders of the run.
        cluster: starts the agents.
        hosts: network namespaces of the nodes; None if they share loopback.
        until: monotonic time at which the run must have ended.
    """

    scenario: Scenario
    place: Place
    cluster: Cluster
    hosts: Hosts | None
    until: float

    @classmethod
    def on(cls, stack: ExitStack, scenario: Scenario, place: Place) -> FixedNodes:
        """Prepare the nodes; they end when the stack is closed."""
        configuration = scenario.configuration
        per_node = configuration.ranks // configuration.nodes
        options = replace(options_of(scenario, place), devices=per_node, num_nodes=configuration.nodes)
        hosts = make_hosts(stack) if configuration.loss is Loss.LINK else None
        cluster = Cluster(
            place.files, stack, options, words=("--nproc-per-node", str(per_node)), arena_dir=place.arenas,
            next_port=free_port() if configuration.loss is Loss.STORE_HOST else 0,
            host=ADDRESSES[0] if hosts else "127.0.0.1",
        )  # fmt: skip
        return cls(scenario, place, cluster, hosts, time.monotonic() + deadline_s(scenario))

    def run(self) -> int:
        """Start the nodes, lose one, restart it, and wait for the end; returns the exit code.

        Raises:
            NotAsExpectedError: If something does not happen as it should.
        """
        agents = [self._start(node) for node in range(self.scenario.configuration.nodes)]
        loss = self.scenario.configuration.loss
        lost = 1 if loss is Loss.LINK else 0 if loss is Loss.STORE_HOST else len(agents) - 1
        if loss is Loss.LINK:
            self._cut(agents[lost])
        else:
            if (code := self._end_of(agents[lost])) != -signal.SIGKILL:
                raise NotAsExpectedError(f"node {lost} was to be killed, but exited with code {code}", code or 1)
            if loss is not Loss.AGENT:
                self.cluster.remove_arena(agents[lost])
            if len(agents) == 1:
                # The new agent hosts the rendezvous again.
                self.cluster.agents.clear()
        agents[lost] = self._start(lost)
        return max(map(self._end_of, agents), key=abs)

    def _start(self, node: int) -> psutil.Popen:
        faults = ",".join(map(str, self.scenario.injected))
        if self.hosts is None:
            return self.cluster.start_agent(faults, f"127.0.0.{node + 1}")
        return self.cluster.start_agent(faults, ADDRESSES[node], env=self.hosts.env, within=self.hosts.within(node))

    def _cut(self, agent: psutil.Popen) -> None:
        """Cut the link to the second node until its agent has exited."""
        assert self.hosts is not None
        (fault,) = self.scenario.outside
        watch = Watch(self.cluster.folder / "runs", self.place.commits)
        while watch.look().committed < fault.step:
            if time.monotonic() > self.until:
                raise NotAsExpectedError(f"step {fault.step} was not committed in time")
            threading.Event().wait(LOOK_S)
        self.hosts.cut()
        self._end_of(agent)
        self.hosts.restore()

    def _end_of(self, agent: psutil.Popen) -> int:
        try:
            return int(agent.wait(timeout=max(0.0, self.until - time.monotonic())))
        except psutil.TimeoutExpired as error:
            raise NotAsExpectedError(f"an agent did not exit in time: {error}") from error


def lose_node(scenario: Scenario, place: Place, right: Variant) -> Evidence:
    """Train while one node is lost and restarted, and compare the run with the undisturbed one."""
    exit_code: int | None
    with ExitStack() as stack:
        try:
            nodes = FixedNodes.on(stack, scenario, place)
            exit_code, why = nodes.run(), ""
        except pytest.skip.Exception as reason:
            return Evidence(0, identical=True, left_out=(f"cut: {reason.msg}",))
        except NotAsExpectedError as error:
            exit_code, why = error.exit_code, str(error)
    comparison = None
    if exit_code == 0:
        collect_logs(read_traces(place.files / "trace").values(), place.files / "logs", since=0)
        comparison = compare(right.folder, place.files)
    found = _read(scenario, place.files, exit_code, why)
    return replace(
        found,
        identical=comparison is not None and comparison.identical,
        difference=str(comparison),
        struck=(*found.struck, *map(str, scenario.outside)),
        lost=lost_steps(commits_of(place.commits), found.events),
    )


def _read(scenario: Scenario, folder: Path, exit_code: int | None, why: str) -> Evidence:
    """Return what the ledger of a run says."""
    ledger = folder / "runs" / "two-nodes" / LEDGER_NAME
    happened = sorted(FaultMarks.claimed(ledger.parent / "faults"))
    struck = tuple(scenario.named(scenario.injected[index]) for index in happened)
    return Evidence(exit_code, identical=False, events=read_ledger(ledger).events, struck=struck, why=why)


# ---------------------------------------------------------------------- an elastic number of nodes


def lose_elastic_node(scenario: Scenario, place: Place, right: Account, words: tuple[str, ...]) -> Evidence:
    """Train on three nodes, one of which is lost and rejoins; the others continue with the same samples.

    Weights differ from those of the undisturbed run only through the order of summation.
    """
    (fault,) = scenario.injected
    folder, exit_code, why = place.files / "elastic", None, ""
    with ExitStack() as stack:
        nodes = Nodes(folder, stack, least=2, most=3, words=words)
        try:
            nodes.lose_and_rejoin(int(fault.rank), str(fault), of=3, left=2)
            exit_code = 0
        except (AssertionError, psutil.TimeoutExpired) as error:
            why = str(error)[-500:]
    found, ended = account_of(folder), (folder / "end.json").exists()
    same_samples = ended and found.steps == right.steps
    apart = largest_difference(right, found) if ended else float("inf")
    return replace(
        _read(scenario, folder, exit_code, why),
        identical=same_samples and apart < BOUND,
        difference=json.dumps({"the same samples": same_samples, "weights differ by": apart}),
    )
