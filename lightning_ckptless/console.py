"""Messages on stderr, each on a line of its own, beside progress bars that other code draws.

A bar leaves the cursor at the end of an unfinished line, and a bar of several lines redraws itself from some lines
further up. A message in between begins a line first, and leaves room for what is redrawn after it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from enum import StrEnum

PREFIX = "ckptless: "
_PACKAGE_LOG = logging.getLogger("lightning_ckptless")
_CLEAR_LINE = "\r\x1b[K"
_LINES_REDRAWN = 1
"""Lines above the cursor that a live display of Lightning's, training and validation, overwrites at most."""


class Bar(StrEnum):
    """What kind of progress bar the terminal shows."""

    NONE = "none"
    LINE = "line"
    LIVE = "live"


class Console:
    """Writes messages to a process's stderr.

    Attributes:
        bar: the kind of bar that this process or another one draws on the same terminal.
    """

    def __init__(self) -> None:
        self.bar = Bar.NONE
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a message at once.

        Args:
            text: without the name of the package, which is put before it.
        """
        with self._lock:
            write(framed(f"{PREFIX}{text}", self.bar, terminal=sys.stderr.isatty()))


class WarningsOnConsole(logging.Handler):
    """Shows this package's warnings apart from progress bars, where the program has set up no logging of its own.

    Args:
        say: prints a message, which is given without the name of the package.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        self._say(self.format(record).removeprefix(PREFIX))

    def attach(self) -> None:
        """Take over from what Python does with warnings of a program without logging: print them anywhere."""
        if not _PACKAGE_LOG.hasHandlers():
            _PACKAGE_LOG.addHandler(self)

    def detach(self) -> None:
        """Leave warnings to Python again."""
        _PACKAGE_LOG.removeHandler(self)


def write(message: str) -> None:
    """Write a message to the stderr of now, and nowhere that a program may have put in the place of `print`."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def framed(message: str, bar: Bar, *, terminal: bool) -> str:
    """A message with what separates it from a progress bar.

    Args:
        message: text of one or more lines.
        bar: the kind of bar that may have left an unfinished line.
        terminal: whether it is shown on a terminal, which can clear a line; a file or pipe cannot.
    """
    if bar is Bar.NONE:
        return message
    if bar is Bar.LIVE:
        return f"\n{message}" + "\n" * _LINES_REDRAWN if terminal else message
    return f"{_CLEAR_LINE}{message}" if terminal else f"\n{message}"


CONSOLE = Console()
"""The one of this process: there is but one stderr."""
