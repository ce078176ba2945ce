"""Messages on stderr, each on its own line, next to progress bars drawn by other code.

A bar leaves the cursor at the end of an unfinished line, and a multi-line bar redraws itself starting some lines
further up. A message printed in between starts a new line and leaves room for the redraw.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from enum import StrEnum

PREFIX = "ckptless: "
PACKAGE_LOG = logging.getLogger("lightning_ckptless")
_CLEAR_LINE = "\r\x1b[K"
_LINES_REDRAWN = 1
"""Most lines above the cursor that Lightning's live display (training and validation bars) overwrites."""


class Bar(StrEnum):
    """What kind of progress bar the terminal shows."""

    NONE = "none"
    LINE = "line"
    LIVE = "live"


class Console:
    """Writes messages to a process's stderr.

    Attributes:
        bar: the kind of bar that this or another process draws on the same terminal.
    """

    def __init__(self) -> None:
        self.bar = Bar.NONE
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a message at once.

        Args:
            text: message without the package prefix, which is added.
        """
        with self._lock:
            write(framed(f"{PREFIX}{text}", self.bar, terminal=sys.stderr.isatty()))


class WarningsOnConsole(logging.Handler):
    """Prints this package's warnings without garbling progress bars, if the script has not configured logging.

    Args:
        say: prints a message, passed without the package prefix.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        self._say(self.format(record).removeprefix(PREFIX))

    def attach(self) -> None:
        """Replace Python's last-resort handler, which would print into the middle of a progress bar."""
        if not PACKAGE_LOG.hasHandlers():
            PACKAGE_LOG.addHandler(self)

    def detach(self) -> None:
        """Return warnings to Python's default handling."""
        PACKAGE_LOG.removeHandler(self)


def write(message: str) -> None:
    """Write a message to the current `sys.stderr`, bypassing any replacement of `print`."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def framed(message: str, bar: Bar, *, terminal: bool) -> str:
    """Add the control characters that separate a message from a progress bar.

    Args:
        message: text of one or more lines.
        bar: the kind of bar that may have left an unfinished line.
        terminal: whether the output is a terminal, which can clear a line; a file or pipe cannot.
    """
    if bar is Bar.NONE:
        return message
    if bar is Bar.LIVE:
        return f"\n{message}" + "\n" * _LINES_REDRAWN if terminal else message
    return f"{_CLEAR_LINE}{message}" if terminal else f"\n{message}"


CONSOLE = Console()
"""The console of this process; there is only one stderr."""
