"""An agent that is asked to end: the signal becomes an exception in its main thread."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class AskedToEnd(BaseException):
    """A signal asked this process to end. Not an `Exception`: nothing on its way is to handle it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"asked to end by {number.name}")
        self.number = number


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Have signals that ask a process to end raise `AskedToEnd`. Only for the main thread.

    A signal that is ignored stays so, as under `nohup`. After the first one all are ignored, for the workers get their
    time to end and the agent sees to that.
    """
    before = {number: signal.getsignal(number) for number in ASKING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    for other in ASKING:
        signal.signal(other, signal.SIG_IGN)
    raise AskedToEnd(signal.Signals(number))
