"""Termination signals of the agent, raised as an exception in its main thread."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class AskedToEnd(BaseException):
    """A signal asked this process to end. Not an `Exception`, so that no handler in between catches it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"asked to end by {number.name}")
        self.number = number


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Make termination signals raise `AskedToEnd`. For the main thread only.

    An ignored signal stays ignored, as under `nohup`. After the first one all are ignored until the process ends: the
    workers get time to exit, which the agent enforces, and the exit code remains that of the first one.
    """
    before = {number: signal.getsignal(number) for number in ASKING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _raise:
                signal.signal(number, handler)


@contextmanager
def noting_sigterm(note: Callable[[], None]) -> Iterator[None]:
    """Call a function on the first SIGTERM, within `raising_on_signals`; a second one raises `AskedToEnd`."""
    before = signal.getsignal(signal.SIGTERM)

    def first(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        note()

    signal.signal(signal.SIGTERM, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is first:
            signal.signal(signal.SIGTERM, before)


def _raise(number: int, _frame: FrameType | None) -> None:
    for other in ASKING:
        signal.signal(other, signal.SIG_IGN)
    raise AskedToEnd(signal.Signals(number))
