"""A launch configuration translated to torch elastic: rendezvous, log folders, agent."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from lightning_ckptless import environment
from lightning_ckptless.configuration.variables import variables_of
from lightning_ckptless.errors import LaunchError, UnfitNodeError
from lightning_ckptless.membership.agent.agent import NodeAgent
from lightning_ckptless.membership.agent.assembly import assemble
from lightning_ckptless.membership.agent.departure import DepartedError
from lightning_ckptless.membership.agent.elastic_agent import CkptlessAgent
from lightning_ckptless.membership.agent.held_memory import HeldMemory
from lightning_ckptless.membership.agent.logs import LogFiles, log_files
from lightning_ckptless.membership.agent.notices import Notices, SigtermNotice, load_hook
from lightning_ckptless.membership.agent.scratch import ScratchFolder
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.agent.signals import AskedToEnd
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import AgentEnded, AgentStarted, Announcement, EventSink, RendezvousLost
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.rendezvous.failover import RendezvousFailover
from lightning_ckptless.membership.rendezvous.handlers import one_machine, several_machines
from lightning_ckptless.membership.worker.program import script_path
from lightning_ckptless.protocol.node_liveness import Bound
from lightning_ckptless.protocol.rendezvous_failover import RendezvousEndpoint

# A replacement machine may take long to boot. A node counts as lost after 8 s of silence: longer than a link takes to
# renegotiate.
_RENDEZVOUS_DEFAULTS = {
    "join_timeout": 1800,
    "last_call_timeout": 3,
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 3,
}
_MONITOR_INTERVAL_S = 0.001
_ANY_NUMBER = 2**31 - 1
_OF_ONE_WORKER = (
    environment.FAULT_REPORT,
    environment.MAIN_AT,
    environment.GENERATION,
    environment.FIT_INDEX,
    environment.CALLS,
    environment.CHANNEL,
    environment.STANDBY,
    environment.REGROUPING,
)


class _RendezvousLostError(Exception):
    """The node that hosts the rendezvous is lost."""


class _Runner:
    """Runs one node's workers with one agent after another.

    Args:
        config: what to run.
        parent: fork server of the workers.
        events: receives what happens.
        sigterm: whether SIGTERM has asked to drain this node.

    Raises:
        OptionsError: `preemption_notice` names no function.
    """

    def __init__(self, config: LaunchConfig, parent: ForkServer, events: EventSink, sigterm: SigtermNotice) -> None:
        self.run = NodeRun()
        self._sigterm = sigterm
        self._hook = load_hook(config.preemption_notice, script_path(config.program, config.working_dir))
        self._config = config
        self._settings = _settings(config)
        self._parent = parent
        self._events = events
        self._memory = HeldMemory(self._settings.name, events.report)

    @property
    def node(self) -> str:
        """Name of this node."""
        return self._settings.name

    def run_to_end(self) -> None:
        """Run the workers to their end, at one rendezvous endpoint after another."""
        endpoints = self._config.endpoints
        failover = RendezvousFailover(endpoints, self._config.local_addr) if len(endpoints) > 1 else None
        place = failover.next() if failover is not None else None
        try:
            while True:
                try:
                    self._run_at(place)
                except _RendezvousLostError as error:
                    assert failover is not None and place is not None
                    place = failover.next(lost=place)
                    self._events.report(RendezvousLost(str(error), place.endpoint, place.reason))
                else:
                    return
        except UnfitNodeError as error:
            # The run may continue without this node: the rendezvous stays open for a replacement.
            self._events.report(Announcement(str(error)))
            self.run.exit_code = 1
        except DepartedError:
            self.run.exit_code = 0
        finally:
            self._memory.close()

    def _run_at(self, place: RendezvousEndpoint | None) -> None:
        """Run the workers as long as one rendezvous endpoint is available.

        Args:
            place: the endpoint; None if there is only one.
        """
        config, run = self._config, self.run
        run.exit_code, run.has_given_up = 0, False
        with (
            _rendezvous(config, place) as handler,
            log_files(config) as logs,
            ScratchFolder("agent") as scratch,
        ):
            agent = self._make_agent(scratch.path, logs, handler)
            elastic = CkptlessAgent(_spec(config, handler), logs, agent, self._settings.stop_grace_s)
            try:
                elastic.run()
            except RendezvousClosedError as error:
                if not run.faults:
                    raise LaunchError(f"run {config.run_id!r} was ended by another node") from error
            except (RendezvousError, DistError) as error:
                if place is not None and not place.hosts and agent.has_started:
                    agent.note_lost_rendezvous()
                    raise _RendezvousLostError(agent.partition_reason or f"{type(error).__name__}: {error}") from error
                if agent.partition_reason:
                    raise LaunchError(_partitioned(config, agent.partition_reason)) from error
                raise LaunchError(_rendezvous_failure(config, error)) from error
            finally:
                agent.close()

    def _make_agent(self, folder: Path, logs: LogFiles, handler: Any) -> NodeAgent:
        settings, run, report, clock = self._settings, self.run, self._events.report, Clock()
        bound = _bound(handler)
        notices = Notices(self._sigterm, self._config.preemption_notice, self._hook, report, clock)
        parts = assemble(
            settings, run, self._parent, folder, logs, self._memory, bound, handler, notices, report, clock
        )
        return NodeAgent(settings, run, parts, self._events, clock)


def run_node(config: LaunchConfig, parent: ForkServer, events: EventSink, sigterm: SigtermNotice) -> Outcome:
    """Run this node's workers to their end; see `launch.run`."""
    runner = _Runner(config, parent, events, sigterm)
    run, node = runner.run, runner.node
    events.report(AgentStarted(node, os.getpid()))
    try:
        runner.run_to_end()
    finally:
        events.report(AgentEnded(node, run.exit_code))
    return Outcome(run.exit_code, run.relaunches, tuple(run.faults), run.recoveries_in_place, run.has_given_up)


def _spec(config: LaunchConfig, handler: RendezvousHandler) -> WorkerSpec:
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc,
        entrypoint=config.program.target,
        rdzv_handler=handler,
        # Restarts are not counted by torch elastic: protocol/retry_policy.py decides.
        max_restarts=_ANY_NUMBER,
        monitor_interval=_MONITOR_INTERVAL_S,
        local_addr=config.local_addr,
    )


def _bound(handler: Any) -> Bound:
    settings = handler.settings
    return Bound(settings.keep_alive_interval.total_seconds(), settings.keep_alive_max_attempt)


def _settings(config: LaunchConfig) -> NodeSettings:
    host = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname())
    return NodeSettings(
        name=config.node_name or f"{host}-{os.getpid()}",
        program=config.program,
        env=_base_env(config),
        cwd=config.working_dir,
        fresh=config.fresh or config.program.kind == "executable",
        stop_grace_s=config.stop_grace_s,
        finish_grace_s=config.finish_grace_s,
        exit_grace_s=config.exit_grace_s,
        run_folder=(config.run_root or environment.run_root()).absolute() / config.run_id,
        least_nodes=config.node_range[0],
        endpoints=len(config.endpoints),
        max_restarts=config.max_restarts,
        max_recoveries_without_progress=config.max_recoveries_without_progress,
        max_recoveries_per_hour=config.max_recoveries_per_hour,
        in_place=config.in_place,
        standbys=config.standbys,
        preload_imports=config.preload_imports,
        log_line_prefix=config.log_line_prefix,
        time_limit_s=config.time_limit_s,
        replacement_outputs=_replacement_outputs(config),
    )


def _replacement_outputs(config: LaunchConfig) -> Path | None:
    """Folder for output of new processes until they have joined the other ranks: below the logs, or the run folder."""
    folder = config.log_dir or (config.run_root / config.run_id if config.run_root is not None else None)
    return None if folder is None else folder.absolute() / "replacements"


def _base_env(config: LaunchConfig) -> dict[str, str]:
    env = {**os.environ, **config.env, **variables_of(config), environment.NNODES: config.nnodes}
    env[environment.AGENT_STARTED_AT] = repr(time.time())
    if config.nproc > 1:
        # As torchrun does; otherwise each worker would start as many threads as there are cores.
        env.setdefault("OMP_NUM_THREADS", "1")
    for name in _OF_ONE_WORKER:
        env.pop(name, None)
    return env


@contextmanager
def _rendezvous(config: LaunchConfig, place: RendezvousEndpoint | None) -> Iterator[RendezvousHandler]:
    alone = _is_alone(config)
    handler = _handler_alone(config) if alone else _handler_among_others(config, place)
    asked_to_end = False
    try:
        yield handler
    except (AskedToEnd, DepartedError, KeyboardInterrupt, UnfitNodeError, _RendezvousLostError):
        asked_to_end = True
        raise
    finally:
        # Closing the rendezvous ends it for all nodes. If only this node ends, another may take its place.
        if alone or not asked_to_end:
            handler.shutdown()


def _is_alone(config: LaunchConfig) -> bool:
    """Whether no other agent can take part: there is one node, and no port known to other processes."""
    ports = {endpoint.rpartition(":")[2] for endpoint in config.endpoints}
    return config.node_range[1] == 1 and ports <= {"0"}


def _handler_alone(config: LaunchConfig) -> RendezvousHandler:
    settings = {**_RENDEZVOUS_DEFAULTS, **config.rdzv_conf}
    return one_machine(config.run_id, int(settings["keep_alive_interval"]), int(settings["keep_alive_max_attempt"]))


def _handler_among_others(config: LaunchConfig, place: RendezvousEndpoint | None) -> RendezvousHandler:
    least, most = config.node_range
    settings: dict[str, Any] = {**_RENDEZVOUS_DEFAULTS, **config.rdzv_conf}
    if place is not None:
        settings["is_host"] = place.hosts
    endpoint = config.rdzv_endpoint if place is None else place.endpoint
    try:
        return several_machines(
            RendezvousParameters("c10d", endpoint, config.run_id, least, most, config.local_addr, **settings)
        )
    except (RendezvousError, ValueError) as error:
        raise LaunchError(_rendezvous_failure(config, error)) from error


def _partitioned(config: LaunchConfig, reason: str) -> str:
    return (
        f"run {config.run_id!r}: this node is partitioned: {reason}; its workers are stopped, and the other nodes may "
        "have continued without it: start its agent again once the network works"
    )


def _rendezvous_failure(config: LaunchConfig, error: Exception) -> str:
    where = config.rdzv_endpoint or "this machine"
    reason = f"{type(error).__name__}: {error}"
    return f"run {config.run_id!r}: the rendezvous of {config.nnodes} node(s) at {where} failed: {reason}"
