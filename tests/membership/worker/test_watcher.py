"""A watcher receives messages while the training thread is busy, and aborts connections until that thread notices."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.watcher import ThreadedWatcher, Watcher
from lightning_ckptless.protocol.messages import (
    AskToLeave,
    CannotRecover,
    Finish,
    MayLeave,
    Message,
    Regroup,
    ReleasedGroups,
    RunOver,
    StepCommitted,
    TrainingFailed,
)
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded

AT_END = AtEnd(12, WhyEnded.NO_DATA)
FAULT = FaultReport(1, 99, None, "SIGKILL", 1.0, 2.0, 3.0, 1, 2)


class Cuts:
    """Counts cuts, and lets a test wait for some."""

    def __init__(self) -> None:
        self.some = threading.Semaphore(0)

    def __call__(self) -> int:
        self.some.release()
        return 1

    def wait(self, count: int) -> bool:
        return all(self.some.acquire(timeout=5) for _ in range(count))


@pytest.fixture
def cuts() -> Cuts:
    return Cuts()


@pytest.fixture
def agent() -> Iterator[AgentChannel]:
    ours, theirs = AgentChannel.pair()
    vars(ours)["other"] = theirs
    yield ours
    ours.close()
    theirs.close()


@pytest.fixture
def watcher(agent: AgentChannel, cuts: Cuts) -> Iterator[ThreadedWatcher]:
    watching = ThreadedWatcher(vars(agent)["other"], cuts)
    yield watching
    watching.close()


def regroup(agent: AgentChannel, number: int) -> None:
    agent.send(Regroup(number, asdict(FAULT), {}))


def test_connections_are_aborted_from_a_regrouping_until_the_old_groups_are_released(
    agent: AgentChannel, watcher: Watcher, cuts: Cuts
) -> None:
    seen = [watcher.is_over]
    regroup(agent, 1)
    assert cuts.wait(3)
    seen.append(watcher.is_over)
    assignment = watcher.accept(5.0)
    assert assignment is not None
    assert (assignment.number, assignment.fault) == (1, FAULT)
    assert [*seen, watcher.is_over] == [False, True, False]
    # The thread of the mirror may still wait in them.
    while cuts.some.acquire(blocking=False):
        pass
    assert cuts.wait(3)


def test_nothing_is_aborted_after_the_old_groups_are_released(agent: AgentChannel) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def cut() -> int:
        begun.set()
        assert go_on.wait(5)
        done.append("cut")
        return 1

    def leave() -> None:
        accepted = watching.accept(5.0) is not None
        watching.release()
        done.append(f"accepted {accepted}")

    watching = ThreadedWatcher(vars(agent)["other"], cut)
    try:
        regroup(agent, 1)
        assert begun.wait(5)
        leaving = threading.Thread(target=leave)
        leaving.start()
        leaving.join(0.05)
        go_on.set()
        leaving.join(5)
    finally:
        watching.close()
    assert done[-1] == "accepted True"
    assert [received.message for received in agent.poll()] == [ReleasedGroups()]


def test_only_the_newest_regrouping_counts(agent: AgentChannel, watcher: Watcher, cuts: Cuts) -> None:
    for number in (1, 2, 3):
        regroup(agent, number)
    assert cuts.wait(3)
    numbers = []
    while (assignment := watcher.accept(0.05)) is not None:
        numbers.append(assignment.number)
    assert numbers[-1] == 3
    assert numbers == sorted(numbers)


def test_a_rank_that_waits_for_no_other_is_stopped_as_well(agent: AgentChannel, watcher: Watcher, cuts: Cuts) -> None:
    watcher.heed()
    regroup(agent, 1)
    assert cuts.wait(1)
    with pytest.raises(TransportError, match="the ranks are regrouping"):
        watcher.heed()
    assert watcher.accept(5.0) is not None
    watcher.heed()


def test_accept_returns_none_when_no_regrouping_comes_in_time(watcher: Watcher) -> None:
    assert watcher.accept(0.01) is None


@pytest.mark.parametrize("how", ["over", "gone"])
def test_no_worker_waits_once_the_run_is_over(agent: AgentChannel, watcher: Watcher, how: str) -> None:
    if how == "over":
        agent.send(RunOver())
    else:
        agent.close()
    assert watcher.accept(60.0) is None
    assert watcher.is_run_over


def test_a_request_to_finish_is_received(agent: AgentChannel, watcher: Watcher, cuts: Cuts) -> None:
    agent.send(Finish())
    regroup(agent, 1)
    assert cuts.wait(1)
    assert watcher.finish_asked


def test_the_agent_receives_messages_of_a_worker(agent: AgentChannel, watcher: Watcher) -> None:
    watcher.send(StepCommitted([]))
    watcher.send(CannotRecover("because", lasting=False))
    received = agent.receive()
    assert received is not None and received.message == StepCommitted([])
    assert [each.message for each in agent.poll()] == [CannotRecover("because", lasting=False)]


def test_a_channel_whose_other_end_has_closed_reports_it(agent: AgentChannel) -> None:
    vars(agent)["other"].close()
    agent.send(StepCommitted([]))
    assert agent.poll() == []
    assert agent.ended


@pytest.mark.parametrize("answer", [MayLeave(0), Finish(), RunOver(), None], ids=lambda answer: type(answer).__name__)
def test_the_loop_is_left_when_the_agent_allows_it_or_the_run_ends(
    agent: AgentChannel, watcher: Watcher, answer: Message | None
) -> None:
    if answer is None:
        agent.close()
    else:
        agent.send(answer)
    assert watcher.ask_to_leave(AT_END)


def test_a_worker_that_asks_to_leave_may_have_to_regroup(agent: AgentChannel, watcher: Watcher) -> None:
    """The agent announced a regrouping before it received the question, so its answer does not count."""
    regroup(agent, 1)
    agent.send(MayLeave(0))
    assert not watcher.ask_to_leave(AT_END)
    assert watcher.accept(5.0) is not None
    asking = threading.Thread(target=lambda: answers.append(watcher.ask_to_leave(AT_END)))
    answers: list[bool] = []
    asking.start()
    asking.join(0.1)
    assert answers == []
    agent.send(MayLeave(1))
    asking.join(5)
    assert answers == [True]
    asked = [received.message for received in agent.poll() if isinstance(received.message, AskToLeave)]
    assert asked == [AskToLeave(number, 12, "ran out of training data") for number in (0, 1)]


@contextmanager
def forked_process() -> Iterator[None]:
    """A process that is forked from this one, and holds duplicates of whatever this one has open."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_watcher_stops_while_forked_processes_still_run(agent: AgentChannel) -> None:
    watching = ThreadedWatcher(vars(agent)["other"], lambda: 0)
    with forked_process():
        closing = threading.Thread(target=watching.close)
        closing.start()
        closing.join(2)
        ended = not closing.is_alive()
    closing.join()
    assert ended
    assert not any(thread.name == "ckptless-watcher" for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_end_of_a_channel_is_visible_while_forked_processes_hold_it_open(agent: AgentChannel) -> None:
    with forked_process():
        vars(agent)["other"].close()
        assert select.select([agent.fileno()], [], [], 2)[0]
        assert agent.receive() is None


def test_a_waiting_worker_learns_why_training_cannot_continue(
    agent: AgentChannel, watcher: Watcher, cuts: Cuts
) -> None:
    agent.send(TrainingFailed("rank 1 ran out of training data"))
    assert watcher.ask_to_leave(AT_END)
    assert watcher.failure == "rank 1 ran out of training data"
    assert watcher.accept(5.0) is None
    assert cuts.wait(1)
