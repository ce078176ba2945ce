"""Virtual time: tasks with ordinary blocking code, of which one runs at a time, in an order that a seed determines.

A task is a function that may wait. Each has a thread, but the next one runs only when the one before waits, so nothing
depends on the operating system. Whoever waits takes the next event from the queue. Time passes only there.
"""

from __future__ import annotations

import heapq
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NoReturn


class StoppedError(BaseException):
    """Unwinds a task at the end of the simulation. Not an `Exception`: no code of a worker may handle it."""


class _Carrier(threading.Thread):
    """A thread that runs one task after another."""

    def __init__(self) -> None:
        super().__init__(name="simulated task", daemon=True)
        self.go = threading.Lock()
        self.go.acquire()
        self.work: Callable[[], None] | None = None

    def run(self) -> None:
        """Run tasks until there is none."""
        while True:
            self.go.acquire()
            if self.work is None:
                return
            self.work()


class Carriers:
    """The threads of all simulations, one after another."""

    def __init__(self) -> None:
        self._idle: list[_Carrier] = []
        self._all: list[_Carrier] = []

    def take(self) -> _Carrier:
        """Return a thread without a task."""
        if self._idle:
            return self._idle.pop()
        carrier = _Carrier()
        carrier.start()
        self._all.append(carrier)
        return carrier

    def give_back(self, carrier: _Carrier) -> None:
        """Note that a thread has finished its task."""
        self._idle.append(carrier)

    def close(self) -> None:
        """End all threads."""
        for carrier in self._all:
            carrier.work = None
            carrier.go.release()
        for carrier in self._all:
            carrier.join()


@contextmanager
def carriers() -> Iterator[Carriers]:
    """Context with threads for simulations, all on one core: between two, each switch takes three times as long."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    made = Carriers()
    try:
        yield made
    finally:
        made.close()
        os.sched_setaffinity(0, cores)


class Task:
    """A task.

    Attributes:
        is_dead: whether it belongs to a process that was killed: it does not run again.
        turn: number of its current wait.
        is_over: whether its function has returned.
    """

    def __init__(self, go: threading.Lock) -> None:
        self.go = go
        self.is_dead = False
        self.is_over = False
        self.turn = 0


Waiting = list[Task]
"""The tasks that wait for the same."""
_Event = tuple[float, int, "Task | Callable[[], None]", int]


class Scheduler:
    """Runs tasks and events in virtual time.

    Args:
        seed: determines all delays, and so the order of everything.
        carriers: threads for the tasks.

    Attributes:
        now: virtual time, in seconds.
        chance: the only source of randomness.
    """

    def __init__(self, seed: int, carriers: Carriers) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self._carriers = carriers
        self._order = count()
        self._events: list[_Event] = []
        self._tasks: list[Task] = []
        main = threading.Lock()
        main.acquire()
        self._main = Task(main)
        self._current = self._main
        self._is_stopping = False
        self._is_in_event = False
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------ events

    def delay(self, mean_s: float) -> float:
        """A random delay."""
        return self.chance.expovariate(1.0 / mean_s)

    def later(self, mean_s: float, action: Callable[[], None]) -> None:
        """Call a function, which must not wait, after a random delay."""
        self._push(self.now + self.chance.expovariate(1.0 / mean_s), action, 0)

    def at(self, instant: float, action: Callable[[], None]) -> None:
        """Call a function, which must not wait, at a virtual instant."""
        self._push(instant, action, 0)

    def _push(self, at: float, what: Task | Callable[[], None], turn: int) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, turn))

    def run(self, until_s: float) -> bool:
        """Run until no event is left; returns whether that was before a virtual instant."""
        try:
            self._push(until_s, self._main, self._main.turn)
            self._run_events(self._main)
            if self._failure is not None:
                raise self._failure
            return not self._events
        finally:
            self._stop()

    def _run_events(self, me: Task | None) -> None:
        """Run events until it is the turn of a task, and return once it is the turn of `me`."""
        while True:
            following = self._next()
            if following is None:
                continue
            self._current = following
            if following is me:
                return
            following.go.release()
            if me is not None:
                me.go.acquire()
            return

    def _next(self) -> Task | None:
        """Run the next event; returns the task whose turn it is, None if it was no task's."""
        if self._failure is not None or not self._events or self._is_stopping:
            return self._main
        at, _, what, turn = heapq.heappop(self._events)
        if isinstance(what, Task):
            if turn != what.turn or what.is_dead:
                return None
            self.now = self.now if what is self._main else at
            return what
        self.now = at
        self._is_in_event = True
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - boundary of the simulation: the caller of `run` raises it
            self._failure = self._failure or error
        self._is_in_event = False
        return None

    # ------------------------------------------------------------------ tasks

    def spawn(self, function: Callable[[], None]) -> Task:
        """Start a task, which may wait."""
        carrier = self._carriers.take()
        task = Task(carrier.go)
        self._tasks.append(task)

        def work() -> None:
            try:
                if not self._is_stopping:
                    function()
            except StoppedError:
                pass
            except BaseException as error:  # noqa: BLE001 - boundary of the thread: the caller of `run` raises it
                self._failure = self._failure or error
            task.is_over = True
            task.turn += 1
            self._carriers.give_back(carrier)
            self._run_events(None)

        carrier.work = work
        self._push(self.now, task, task.turn)
        return task

    def sleep(self, duration_s: float) -> None:
        """Let virtual time pass for the current task."""
        task = self._begin_wait()
        self._push(self.now + duration_s, task, task.turn)
        self._wait(task)

    def wait_for(self, waiting: Waiting, holds: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Let the current task wait until a condition holds; returns whether it does.

        Args:
            waiting: notified by `notify` when the condition may hold.
            holds: the condition.
            timeout_s: longest wait; None without a limit.
        """
        deadline = None if timeout_s is None else self.now + timeout_s
        while not holds():
            if deadline is not None and self.now >= deadline:
                return False
            task = self._begin_wait()
            waiting.append(task)
            if deadline is not None:
                self._push(deadline, task, task.turn)
            self._wait(task)
            if task in waiting:
                waiting.remove(task)
        return True

    def notify(self, waiting: Waiting, mean_s: float = 0.0) -> None:
        """Let tasks check their conditions, each after a random delay."""
        for task in waiting:
            self._push(self.now + (self.delay(mean_s) if mean_s else 0.0), task, task.turn)
        waiting.clear()

    def end_here(self) -> NoReturn:
        """End the current task, whose process has exited."""
        task = self._begin_wait()
        task.is_dead = True
        self._wait(task)
        raise StoppedError

    def require(self, holds: bool, text: str) -> None:
        """End the simulation with an error unless a condition holds; no code of a worker handles the error."""
        if holds:
            return
        self._failure = self._failure or AssertionError(text)
        if not self._is_in_event:
            self.end_here()

    def _begin_wait(self) -> Task:
        task = self._current
        assert task is not self._main, "only a task may wait"
        task.turn += 1
        return task

    def _wait(self, task: Task) -> None:
        if not self._is_stopping:
            self._run_events(task)
        if self._is_stopping:
            raise StoppedError
        task.turn += 1

    def _stop(self) -> None:
        """Unwind all tasks that still wait."""
        self._is_stopping = True
        for task in self._tasks:
            if not task.is_over:
                self._current = task
                task.go.release()
                self._main.go.acquire()


class Monitor:
    """What `threading.Condition` is between threads, between tasks and events: only one of them runs at a time.

    Args:
        scheduler: runs them.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiting: Waiting = []

    def __enter__(self) -> None:
        """Nothing to lock."""

    def __exit__(self, *_: object) -> None:
        """Nothing to unlock."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until a condition holds; see `Scheduler.wait_for`."""
        return self._scheduler.wait_for(self._waiting, predicate, timeout)

    def notify_all(self) -> None:
        """Let those that wait check their conditions."""
        self._scheduler.notify(self._waiting, 0.0005)
