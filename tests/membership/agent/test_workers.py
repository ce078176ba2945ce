"""Where the workers of a node are, as their messages tell."""

from __future__ import annotations

import signal
from collections.abc import Mapping

import pytest

from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.messages import AskToLeave, EnteredLoop, FitReturned, LeftLoop, Message, ReachedFit
from lightning_ckptless.protocol.uneven_steps import WhyEnded
from tests.simulation.node import Machine, SimulatedChannel, SimulatedProcess

ENTERED = EnteredLoop(True, 0, True, None, 10, 60, None, "none", "", 2.0, None)
RANKS: tuple[int, ...] = (0, 1)


class Workers:
    """Two workers and what they say."""

    def __init__(self) -> None:
        self.channels: list[SimulatedChannel] = []
        self.signals: dict[int, list[int]] = {rank: [] for rank in RANKS}
        job, outputs = Job(Program("script", "train.py", ()), {}, ""), dict.fromkeys(RANKS, "")
        jobs = dict.fromkeys(RANKS, job)
        self.group = WorkerGroup(Machine(self._start), jobs, stdouts=outputs, stderrs=outputs)
        self.group.start()

    def _start(self, _: Mapping[str, str]) -> SimulatedProcess:
        rank = len(self.channels)
        self.channels.append(SimulatedChannel(lambda _: None))
        return SimulatedProcess(rank + 1, self.channels[-1], self.signals[rank].append, lambda: self._end_of(rank))

    def _end_of(self, rank: int) -> End | None:
        """The kernel takes a while to end a process: until it is sent a second signal, if it was killed as hung."""
        sent = self.signals[rank]
        return End(-sent[0], 1.0) if len(sent) > bool(self.group.hang_reason(rank)) else None

    def say(self, message: Message, *ranks: int) -> None:
        for rank in ranks or RANKS:
            self.channels[rank].arrive(message)
        self.group.receive()

    def fit(self) -> None:
        """Train to the end and return from `fit`."""
        self.say(ReachedFit())
        self.say(ENTERED)
        self.say(AskToLeave(0, 12, str(WhyEnded.NO_DATA)))
        self.group.allow_leave()
        self.say(LeftLoop())
        self.say(FitReturned())


def test_workers_are_done_from_their_last_step_until_another_fit_trains() -> None:
    workers = Workers()
    done = [workers.group.are_done]
    for begins in (ReachedFit(), ENTERED, AskToLeave(0, 12, str(WhyEnded.NO_DATA))):
        workers.say(begins)
        done.append(workers.group.are_done)
    workers.group.allow_leave()
    for ends in (LeftLoop(), FitReturned()):
        workers.say(ends)
        done.append(workers.group.are_done)
    workers.say(ReachedFit())
    workers.say(ENTERED)
    assert [*done, workers.group.are_done] == [False, False, False, True, True, True, False]
    assert workers.group.past_loop == ()


def test_a_worker_that_has_left_the_loop_is_past_it() -> None:
    workers = Workers()
    workers.fit()
    assert workers.group.past_loop == RANKS
    workers.say(ReachedFit(), 1)
    workers.say(ENTERED, 1)
    assert workers.group.past_loop == (0,)


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_workers_train_and_leave_together_in_every_fit(calls_before: int) -> None:
    workers = Workers()
    for _ in range(calls_before):
        workers.fit()
    workers.say(ReachedFit())
    workers.say(ENTERED)
    assert workers.group.all_train
    workers.say(AskToLeave(0, 24, str(WhyEnded.NO_DATA)), 0)
    assert not workers.group.all_at_end
    workers.say(AskToLeave(0, 24, str(WhyEnded.NO_DATA)), 1)
    assert workers.group.all_at_end


def test_a_hung_worker_that_is_slow_to_die_has_failed() -> None:
    workers = Workers()
    workers.group.kill_hung([0], "hung", 0.0)
    assert workers.group.failed() == {}
    workers.group.stop(signal.SIGTERM, 1.0)
    assert list(workers.group.failed()) == [0]
