"""One trainer call in a worker: recorded after it has returned, and replayed if an earlier process has recorded it."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning import log_files as host_loggers
from lightning_ckptless.internals.lightning.calls import around_stage
from lightning_ckptless.internals.lightning.launch import ends_on_purpose, is_fit
from lightning_ckptless.membership.channel.agent_channel import open_channel
from lightning_ckptless.protocol.messages import CannotRecover
from lightning_ckptless.trainer.outputs.loggers import RunLoggers
from lightning_ckptless.trainer.recovery.own_process import leave_process
from lightning_ckptless.trainer.session.identity import count_call, fits_before, identify
from lightning_ckptless.trainer.session.past_call_replay import digests_of, record_evaluation, record_fit, replay_call
from lightning_ckptless.trainer.session.past_calls import PastCalls, Record
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.plain_values import measure
from lightning_ckptless.trainer.state.surroundings import Surroundings

if TYPE_CHECKING:
    from lightning_ckptless.replica.arena import Arena
    from lightning_ckptless.trainer.data.training_data import TrainingData
    from lightning_ckptless.trainer.session.engine import Engine
    from lightning_ckptless.trainer.session.running_fit import RunningFit

MOST_RESULT_BYTES = 16_000_000
"""Largest result of a call that is recorded: predictions may exceed the size of the model."""


class TrainerCall:
    """One trainer call.

    Args:
        strategy: strategy of the trainer.
        trainer: the trainer.
        function: implementation of the trainer method that the script called.
        args: arguments of the function.
        kwargs: keyword arguments of the function.
    """

    def __init__(
        self,
        strategy: Any,
        trainer: Any,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.args = args
        self.is_fit = is_fit(function)
        self.function = function
        self._kwargs = kwargs
        self._past = PastCalls.of(strategy)
        self._number = self._past.number
        self._found = self._past.find(self._number)
        self._loggers = RunLoggers(trainer, identify(trainer).run_folder, fits_before())

    @property
    def is_recorded(self) -> bool:
        """Whether an earlier process has made this call and recorded it."""
        return self._found is not None

    def obstacle(self) -> str | None:
        """Why no new process could reach this call; None if one can."""
        return self._past.obstacle(self._number)

    # ------------------------------------------------------------------ replaying

    def replay(self) -> Any:
        """Replay the recorded call; returns what the call returned."""
        assert self._found is not None
        record = self._found
        self._past.begin_replay()
        try:
            result = replay_call(
                lambda: self.function(*self.args, **self._kwargs),
                self.trainer,
                record,
                self._loggers,
                is_fit=self.is_fit,
            )
        except Exception as error:
            if error is not record["raised"]:
                self._fail(error)
            raise
        finally:
            os.environ.update(record["counts"])
        return result

    def _fail(self, error: Exception) -> None:
        """Record the failure; a replacement also reports it, so that the agent relaunches all workers."""
        self._past.fail_replay(error)
        if environment.REGROUPING in os.environ:
            traceback.print_exception(error)
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> NoReturn:
        if (channel := open_channel()) is not None:
            what = f"a new process could not replay call {self._number + 1} of the script's trainers"
            channel.send(CannotRecover(f"{what}: {reason}", lasting=True))
        leave_process()

    # ------------------------------------------------------------------ making the call

    def begin(self) -> None:
        """Take part in the call. A replacement exits if the call is already over."""
        if environment.REGROUPING not in os.environ:
            self._past.forget(self._number)
        elif self._past.is_over(self._number):
            self._give_up("the call is over, and there is no usable record of it")
        self._past.end_replay()

    def fit(self, engine: Engine, args: Sequence[Any]) -> Any:
        """Run `fit` and record it.

        Args:
            engine: engine of the call.
            args: arguments of the function, possibly changed by a restore.
        """
        recorded: list[Record] = []

        def around(stage: Callable[[], Any]) -> Any:
            if engine.is_at_beginning:
                self._note_loggers()
            result = stage()
            if self._past.are_kept:
                assert engine.running is not None, "the stage runs after the setup of the model"
                engine.running.mirroring.settle()
                recorded.extend(self._record_success(engine.data, engine.running, engine.session.arena))
            return result

        try:
            with around_stage(self.trainer, around):
                result = self.function(*args, **self._kwargs)
        except Exception as error:
            if ends_on_purpose(error) and self._past.are_kept and engine.running is not None:
                engine.running.mirroring.settle()
                self._keep([self._record_fit(engine.data, engine.running, None)], None, raised=error)
            raise
        engine.finish()
        self._keep(recorded, result)
        return result

    def _record_fit(self, data: TrainingData, running: RunningFit, arena: Arena | None) -> Record:
        return record_fit(self.trainer, running.rank_state.host_state, data.hooks.made, arena)

    def _record_success(self, data: TrainingData, running: RunningFit, arena: Arena) -> list[Record]:
        """Record a call that has succeeded; empty if this process lacks the means, e.g. memory."""
        try:
            return [self._record_fit(data, running, arena)]
        except (OSError, MemoryError, RuntimeError) as error:
            # Only a process that replaces a rank in a later call needs the record.
            why = f"{type(error).__name__}: {error}"
            self._past.refuse(self._number, f"{self._name} could not be recorded for new processes: {why}")
            return []

    def evaluate(self) -> Any:
        """Run `validate`, `test` or `predict` and record it."""
        trainer, recorded = self.trainer, list[Record]()
        self._resume_loggers()
        model = trainer.lightning_module if self.args[0] is None else self.args[0]
        before = digests_of(model) if self._past.are_kept else {}
        count_call()

        def around(stage: Callable[[], Any]) -> Any:
            if not self._past.are_kept:
                return stage()
            self._note_loggers()
            surroundings = Surroundings(trainer)
            surroundings.watch_objects()
            small = HostState(trainer, trainer.strategy.options, surroundings)
            result = stage()
            recorded.append(record_evaluation(trainer, small, before))
            return result

        with around_stage(trainer, around):
            result = self.function(*self.args, **self._kwargs)
        self._keep(recorded, result)
        return result

    @property
    def _name(self) -> str:
        name = self.function.__name__.split("_")[1]
        return f"call {self._number + 1} of the script's trainers ({name})"

    def _keep(self, recorded: list[Record], result: Any, raised: Exception | None = None) -> None:
        if not recorded:
            return
        record = recorded[0]
        size_bytes = measure(result, MOST_RESULT_BYTES)
        if size_bytes is None or size_bytes > MOST_RESULT_BYTES:
            limit = f"more than {MOST_RESULT_BYTES // 1_000_000} MB"
            kind = "data other than plain values" if size_bytes is None else limit
            self._past.refuse(self._number, f"{self._name} returned {kind}, which is not recorded for new processes")
            return
        record |= {
            "result": result,
            "raised": raised,
            "loggers": self._loggers.identities,
            "counts": {name: os.environ.get(name, "0") for name in (environment.FIT_INDEX, environment.CALLS)},
        }
        self._past.write(self._number, record)

    # ------------------------------------------------------------------ loggers

    @property
    def first_positions(self) -> list[dict[str, Any] | None] | None:
        """Positions of the log files when this call began; None if no process has begun it."""
        noted = self._past.noted(self._number)
        return None if noted is None else json.loads(noted)["logs"]

    def _note_loggers(self) -> None:
        """Record the runs and log positions of the loggers, for a process that makes this call again."""
        if self.trainer.is_global_zero:
            host_loggers.watch_logs(self.trainer.loggers)
            positions = host_loggers.log_positions(self.trainer.loggers)
            self._past.note(self._number, json.dumps({"loggers": self._loggers.identities, "logs": positions}))

    def _resume_loggers(self) -> None:
        """Continue the logger runs that an earlier process has written to in this call."""
        noted = self._past.noted(self._number)
        if noted is None:
            return
        facts = json.loads(noted)
        self._loggers.identify(facts["loggers"])
        if not self.trainer.is_global_zero:
            return
        if self._past.is_refused(self._number):
            # Later calls may have written rows already, so nothing is truncated.
            self._loggers.keep()
        else:
            host_loggers.cut_logs(self.trainer, facts["logs"])
