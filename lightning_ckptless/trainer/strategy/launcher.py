"""The entry of `fit`: in a plain process it starts workers, in a worker it runs the call and handles its errors."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError, UnfitNodeError
from lightning_ckptless.internals.lightning.distribution import distribution_of
from lightning_ckptless.internals.lightning.launch import CKPT_PATH_INDEX, is_stop
from lightning_ckptless.internals.lightning.sigterm import give_exit_code
from lightning_ckptless.internals.lightning.versions import without_beginning
from lightning_ckptless.membership.channel.agent_channel import AgentChannel, is_standby, open_channel
from lightning_ckptless.membership.channel.exit_report import ExitReport, withdraw_exit_report, write_exit_report
from lightning_ckptless.membership.launch.reexec import is_interactive, replace_by_agent
from lightning_ckptless.membership.worker.peer_errors import is_lost_peer
from lightning_ckptless.membership.worker.process_groups import keep_through_device_errors
from lightning_ckptless.membership.worker.watcher import ThreadedWatcher
from lightning_ckptless.protocol.messages import CannotRecover, FitReturned, ReachedFit, ReachedTrainer
from lightning_ckptless.protocol.startup import StartAction
from lightning_ckptless.trainer.recovery.own_process import leave_process
from lightning_ckptless.trainer.session.engine import Engine
from lightning_ckptless.trainer.session.health_check import check_health
from lightning_ckptless.trainer.session.identity import count_fit, fits_before, is_worker, may_be_restarted
from lightning_ckptless.trainer.session.run_folders import hydra_folder
from lightning_ckptless.trainer.session.standby import wait_for_rank
from lightning_ckptless.trainer.session.trainer_call import TrainerCall
from lightning_ckptless.trainer.strategy.notebook import NotebookCall
from lightning_ckptless.trainer.strategy.recoverable import CkptlessMixin

log = logging.getLogger(__name__)

PEER_LOSS_GRACE_S = 30.0
AGENT_MODULE = "lightning_ckptless.runner"


class FitGuard:
    """The launcher's logic, independent of the launcher class that Lightning requires.

    Args:
        strategy: the strategy that is launched.
    """

    def __init__(self, strategy: CkptlessMixin) -> None:
        self.strategy = strategy
        self._is_observed = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run a trainer function here, in forks of a notebook, or in workers of an agent that replaces this process."""
        self.strategy.check_options()
        if not is_worker():
            if self._is_to_fork():
                call = NotebookCall(self.strategy, self.launch, function, args, kwargs, trainer)
                return call.run(_run_root(trainer))
            self._become_agent(trainer)
        if (channel := open_channel()) is not None:
            channel.send(ReachedTrainer(hydra_folder()))
        self.strategy.check_world()
        if is_standby():
            assert channel is not None, "a standby has a channel to its agent"
            model = next((value for value in args if isinstance(value, torch.nn.Module)), None)
            wait_for_rank(channel, self.strategy, trainer, model)
        if trainer is None:
            self._refuse_replacement(function)
            return function(*args, **kwargs)
        self.strategy.is_in_call = True
        try:
            return self._call(TrainerCall(self.strategy, trainer, function, args, kwargs), channel)
        finally:
            self.strategy.is_in_call = False

    def _call(self, call: TrainerCall, channel: AgentChannel | None) -> Any:
        if call.is_recorded:
            return call.replay()
        call.begin()
        if channel is not None and fits_before():
            channel.send(FitReturned())
        if call.is_fit:
            return self._fit(call, channel)
        self._refuse_replacement(call.function)
        withdraw_exit_report(self.strategy.global_rank)
        return call.evaluate()

    def _is_to_fork(self) -> bool:
        """Whether workers are forks of this process rather than processes that run the script again."""
        method = self.strategy.start_method
        if method not in ("popen", "fork"):
            raise OptionsError(
                f"start_method={method!r}: choose 'popen', where workers run the script again, or 'fork', where they "
                "are forks of this process, as in a notebook"
            )
        return method == "fork" or is_interactive()

    def _become_agent(self, trainer: Any) -> None:
        strategy = self.strategy
        env = strategy.cluster_environment
        if env.creates_processes_externally:
            raise OptionsError(
                f"{type(env).__name__} starts one process per rank, where no process could relaunch them. Start one "
                f"agent per node instead: ckptless run --nproc-per-node {strategy.num_processes} SCRIPT "
                "(see the guide on clusters)"
            )
        endpoint = os.environ.get(environment.RDZV_ENDPOINT)
        if strategy.num_nodes > 1 and not endpoint:
            raise OptionsError(
                f"num_nodes={strategy.num_nodes}: the nodes need a rendezvous endpoint. Set "
                f"{environment.RDZV_ENDPOINT}=HOST:PORT on each, or start with: "
                f"ckptless run --nnodes {strategy.num_nodes} --rdzv-endpoint HOST:PORT "
                f"--nproc-per-node {strategy.num_processes} SCRIPT"
            )
        os.environ[environment.LIGHTNING] = distribution_of(strategy)
        if folder := hydra_folder():
            os.environ[environment.HYDRA] = folder
        replace_by_agent(
            nproc=strategy.num_processes,
            nnodes=os.environ.get(environment.NNODES, strategy.num_nodes),
            run_root=_run_root(trainer),
            arena_dir=strategy.options.arena_dir,
            rdzv_endpoint=endpoint,
            agent_module=AGENT_MODULE,
        )

    # ------------------------------------------------------------------ in a worker

    def _refuse_replacement(self, function: Callable[..., Any]) -> None:
        """Refuse to replace a lost rank in a call that a new process cannot reach alone."""
        if environment.REGROUPING in os.environ:
            if (channel := open_channel()) is not None:
                reason = f"the script calls {function.__name__.strip('_')} where the other ranks train"
                channel.send(CannotRecover(reason, lasting=True))
            leave_process()

    def _fit(self, call: TrainerCall, channel: AgentChannel | None) -> Any:
        if channel is not None:
            channel.send(ReachedFit())
        try:
            return self._fit_as_rank(call, channel)
        finally:
            # Exceptions that the script raises from here on end the run.
            if channel is not None:
                channel.send(FitReturned())

    def _fit_as_rank(self, call: TrainerCall, channel: AgentChannel | None) -> Any:
        strategy, trainer = self.strategy, call.trainer
        strategy.joins_alone = environment.REGROUPING in os.environ
        strategy.obstacle_of_calls = call.obstacle()
        self._require_health()
        if channel is not None and strategy.options.in_place:
            keep_through_device_errors()
        strategy.setup_environment()
        engine = Engine(strategy, trainer, count_fit(), channel)
        strategy.engine = engine
        if channel is not None and trainer.world_size > 1:
            number = int(os.environ.get(environment.REGROUPING, "0"))
            strategy.watcher = ThreadedWatcher(channel, strategy.world.abort, number)
        if not self._is_observed:
            made = (observer() for observer in strategy.parts.observers)
            trainer.callbacks.extend(callback for callback in made if callback is not None)
            self._is_observed = True
        try:
            return self._guarded(engine, call)
        except BaseException as error:
            self._handle_error(engine, error)
            engine.session.discard_empty_arena()
            raise
        finally:
            engine.close()
            if strategy.watcher is not None:
                strategy.watcher.close()
                strategy.watcher = None

    def _require_health(self) -> None:
        """Refuse to join the other ranks on an unfit node."""
        strategy = self.strategy
        strategy.set_world_ranks()
        withdraw_exit_report(strategy.global_rank)
        try:
            check_health(strategy.root_device, strategy.options.health_check, os.environ.get(environment.NODE, "?"))
        except UnfitNodeError as error:
            write_exit_report(ExitReport(strategy.global_rank, final=True, reason=str(error), unfit=True))
            raise

    def _guarded(self, engine: Engine, call: TrainerCall) -> Any:
        trainer, args = engine.trainer, list(call.args)
        if self.strategy.joins_alone:
            plan = engine.begin_alone()
        else:
            asked = args[CKPT_PATH_INDEX]
            plan = engine.begin(None if asked is None else str(asked), call.first_positions)
        if plan.enters_midway:
            args[CKPT_PATH_INDEX] = None
        elif plan.action is StartAction.DURABLE:
            args[CKPT_PATH_INDEX] = plan.ckpt_path
        with without_beginning(trainer) if plan.enters_midway else nullcontext():
            return call.fit(engine, args)

    def _handle_error(self, engine: Engine, error: BaseException) -> None:
        """Decide what an exception means: a lost peer, a fault to retry once, or the end of the run.

        Exits without returning where Lightning must not notice: a fault that is recovered from calls no `on_exception`,
        marks no run as failed and saves no checkpoint.
        """
        if is_stop(error) or not isinstance(error, Exception):
            engine.session.report.stopped(error)
            engine.forbid_relaunch(f"stopped by {type(error).__name__}")
            give_exit_code(error)
            return
        if engine.is_joining:
            # A replacement has no state to lose: the agent can relaunch all workers.
            traceback.print_exception(error)
            why = f"a new process failed before it joined the others in fit: {type(error).__name__}: {error}"
            assert self.strategy.watcher is not None, "a process that joins others has an agent"
            self.strategy.watcher.send(CannotRecover(why, lasting=True))
            leave_process()
        if is_lost_peer(error):
            engine.session.report.peer_lost(error)
            if engine.session.identity.own_agent:
                _wait_for_agent(engine)
            leave_process()
        reason = engine.why_final(error) if may_be_restarted() else "the launcher allows no further restart"
        if reason is not None:
            engine.session.report.failed(error, reason)
            engine.forbid_relaunch(reason)
            return
        engine.session.report.raised(error)
        traceback.print_exception(error)
        leave_process()


def _run_root(trainer: Any) -> Path:
    """The folder of all runs: from the environment, or below the trainer's root folder."""
    root = trainer.default_root_dir if trainer is not None else os.getcwd()
    return Path(os.environ.get(environment.RUN_ROOT) or os.path.join(os.path.abspath(root), "ckptless"))


def _wait_for_agent(engine: Engine) -> None:
    """Wait for our agent to end this process; exiting before the agent has seen the peer die would obscure the cause.

    torchrun asks survivors to exit and waits half a minute. There a survivor exits at once, which also releases the
    ranks that still wait for it.
    """
    deadline = time.monotonic() + PEER_LOSS_GRACE_S
    while time.monotonic() < deadline and not engine.is_run_over:
        time.sleep(0.05)


class LauncherMixin:
    """Delegates to `FitGuard`; a class of Lightning that declares the interface follows in the order of bases.

    Args:
        strategy: the strategy that is launched.
    """

    def __init__(self, strategy: CkptlessMixin) -> None:
        self.guard = FitGuard(strategy)

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether notebooks can be trained in."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run a trainer function; see `FitGuard.launch`."""
        return self.guard.launch(function, *args, trainer=trainer, **kwargs)

    def kill(self, signum: Any) -> None:
        """Do nothing: the workers belong to their agent."""
