"""Starting the workers of one node: their environment, and the fork server that forks them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lightning_ckptless import environment
from lightning_ckptless.membership.agent.in_place import joining
from lightning_ckptless.membership.agent.logs import LogFiles
from lightning_ckptless.membership.agent.process_control import ForkedProcesses
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import Report
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.fallback import ForkFallback
from lightning_ckptless.membership.forkserver.import_learning import ImportRequest
from lightning_ckptless.membership.forkserver.imported import Imported
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.membership.worker.hydra import FIRST_WAIT_S, imports_hydra
from lightning_ckptless.protocol.messages import ProgramImported, ReachedTrainer
from lightning_ckptless.protocol.replacement_startup import Imports


class Starter(Protocol):
    """Starts the processes of one node; see `WorkerStarter`."""

    def start(
        self, rendezvous: Round, made: Callable[[WorkerContext], None], regrouping: Regrouping | None
    ) -> WorkerGroup:
        """Start all workers of a round."""

    def start_standby(self, rendezvous: Round, workers: WorkerGroup, stdio: list[int]) -> Process:
        """Start a process without a rank."""

    def env_of(self, rendezvous: Round, local_rank: int) -> dict[str, str]:
        """Return the environment variables that make a process a local rank."""

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Process messages from workers."""

    def maintain_successor(self, received: Sequence[FromWorker], workers: WorkerGroup, *, trains: bool) -> None:
        """Have later processes preload the script's imports."""

    def close(self) -> None:
        """Release what starts processes."""


class WorkerStarter(Starter):
    """Starts the processes of one node by forking a fork server.

    Args:
        settings: the node's settings.
        run: the run on this node.
        parent: fork server; its owner closes it.
        folder: the agent's folder.
        logs: where the workers' output goes.
        learns_imports: whether new processes preload what the script imports, as requested by the workers.
        report: receives events.
        clock: this node's clock.
    """

    def __init__(
        self,
        settings: NodeSettings,
        run: NodeRun,
        parent: ForkServer,
        folder: Path,
        logs: LogFiles,
        learns_imports: Callable[[], bool],
        report: Report,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._run = run
        self._forks = ForkFallback(parent, report, fresh=settings.fresh)
        self._control = ForkedProcesses(lambda: self.parent)
        self._folder = folder
        self._logs = logs
        self._learns_imports = learns_imports
        self._clock = clock

    @property
    def parent(self) -> ForkServer:
        """The fork server that forks now."""
        return self._forks.parent

    def close(self) -> None:
        """End the fork servers that were started here."""
        self._forks.close()

    def start(
        self, rendezvous: Round, made: Callable[[WorkerContext], None], regrouping: Regrouping | None
    ) -> WorkerGroup:
        """Start all workers of a round.

        Args:
            rendezvous: the round.
            made: called with the workers before they start, so that an interrupted start stops those already running.
            regrouping: regrouping in which they join training workers of other nodes; None if all start together.
        """
        joins = {} if regrouping is None else joining(regrouping)
        envs = {local_rank: {**self.env_of(rendezvous, local_rank), **joins} for local_rank in rendezvous.ranks}
        prefixes = rendezvous.line_prefixes(self._settings.log_line_prefix)

        def make() -> WorkerContext:
            context = WorkerContext(
                self._control,
                envs,
                lambda env: self._settings.job(env, fresh=self._forks.fresh),
                self._logs,
                log_line_prefixes=prefixes,
                first_wait_s=self._first_wait_s(),
            )
            made(context)
            return context

        return self._forks.start(make).workers

    def start_standby(self, rendezvous: Round, workers: WorkerGroup, stdio: list[int]) -> Process:
        """Start a process without a rank.

        Args:
            rendezvous: the round.
            workers: this node's workers.
            stdio: its stdin, stdout and stderr.
        """
        # Its rank is not known yet. The last rank is a placeholder: it acts for no node.
        last = max(rendezvous.ranks)
        env = {**self.env_of(rendezvous, last), environment.STANDBY: "1"}
        return self._control.start(workers.job(last, env), stdio)

    def env_of(self, rendezvous: Round, local_rank: int) -> dict[str, str]:
        """Return the environment variables that make a process a local rank."""
        run = self._run
        env = {
            **rendezvous.variables[local_rank],
            "TORCHELASTIC_RESTART_COUNT": str(run.history.count),
            environment.AGENT: str(os.getpid()),
            environment.NODE: self._settings.name,
            environment.SPAWNED_AT: repr(self._clock.wall()),
            environment.AGENT_DIR: str(self._folder),
            environment.IMPORTS: str(self._imports),
        }
        if run.hydra:
            env[environment.HYDRA] = run.hydra
        if run.starts or run.faults:
            env |= self._kept_for(rendezvous, local_rank)
        if run.faults:
            env[environment.FAULT_REPORT] = run.faults[-1].to_json()
        return env

    def _kept_for(self, rendezvous: Round, local_rank: int) -> Mapping[str, str]:
        root = self._settings.env.get(environment.RUN_ROOT)
        if rendezvous.ranks[local_rank] or root is None:
            return {}
        return environment.kept_for_rank_zero(Path(root) / rendezvous.run_id)

    @property
    def _imports(self) -> Imports:
        is_off = self._forks.fresh or not self._learns_imports()
        return Imports.OFF if is_off else self._forks.succession.state

    def _first_wait_s(self) -> float:
        settings = self._settings
        is_named = bool(self._run.hydra) or environment.HYDRA in settings.env
        return 0.0 if is_named or not imports_hydra(settings.program, Path(settings.cwd)) else FIRST_WAIT_S

    # ------------------------------------------------------------------ while workers run

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Record the run folder that Hydra created for the first worker."""
        for _, message, _ in received:
            if isinstance(message, ReachedTrainer):
                self._run.hydra = self._run.hydra or message.hydra

    def maintain_successor(self, received: Sequence[FromWorker], workers: WorkerGroup, *, trains: bool) -> None:
        """Have a successor of the fork server import what the script imports, for processes forked later.

        Args:
            received: what workers have sent.
            workers: this node's workers.
            trains: whether training is under way.
        """
        for local_rank, message, _ in received:
            if isinstance(message, ProgramImported) and self._learns_imports():
                imported = Imported(message.modules, message.variables, message.path)
                self._forks.succession.learn(ImportRequest(imported, workers.job(local_rank, {})))
        if trains:
            self._forks.maintain()
