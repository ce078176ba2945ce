"""Notices that this node is about to be taken away: SIGTERM, or a function of the user that is called periodically.

The function runs in its own thread, so that a hang delays nothing. An exception that it raises is reported once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import NoticeFailed
from lightning_ckptless.membership.events import Report

CALL_EVERY_S = 5.0
_SLOW_S = 30.0
"""A call that has not returned after this time is reported."""
_CLOSE_S = 1.0
ON_SIGTERM = "the agent received SIGTERM"

Hook = Callable[[], object]


class SigtermNotice:
    """Whether SIGTERM asked the agent to drain its node. Set by a signal handler."""

    def __init__(self) -> None:
        self.is_given = False

    def give(self) -> None:
        """Record the signal."""
        self.is_given = True


class Notices:
    """The notices of one agent. Each is taken once.

    Args:
        sigterm: set by the signal handler.
        name: name of the user's function; empty for none.
        hook: the function: returns false, or what is about to happen; None for none.
        report: receives events.
        clock: this node's clock.
        every_s: pause between two calls in seconds.
    """

    def __init__(
        self,
        sigterm: SigtermNotice,
        name: str,
        hook: Hook | None,
        report: Report,
        clock: Clock,
        *,
        every_s: float = CALL_EVERY_S,
    ) -> None:
        self._sigterm = sigterm
        self._name = name
        self._hook = hook
        self._report = report
        self._clock = clock
        self._every_s = every_s
        self._given = ""
        self._failure = ""
        self._has_reported = False
        self._called_at = clock.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> str:
        """Return why this node is about to be taken away; empty if there was no notice since the last call."""
        if self._hook is not None and self._thread is None:
            self._thread = threading.Thread(target=self._ask, args=(self._hook,), name="ckptless-notice", daemon=True)
            self._thread.start()
        self._report_failure()
        if self._sigterm.is_given:
            self._sigterm.is_given = False
            return ON_SIGTERM
        given, self._given = self._given, ""
        return given

    def _report_failure(self) -> None:
        silent_s = self._clock.monotonic() - self._called_at
        if self._thread is not None and self._thread.is_alive() and silent_s > self._every_s + _SLOW_S:
            self._failure = f"it has not returned for {silent_s:.0f} s"
        if self._failure and not self._has_reported:
            self._has_reported = True
            self._report(NoticeFailed(self._name, self._failure))

    def _ask(self, hook: Hook) -> None:
        """Call the function until it gives notice; runs in the thread."""
        while not self._over.wait(self._every_s):
            self._called_at = self._clock.monotonic()
            try:
                found = hook()
            except Exception as error:  # noqa: BLE001 - the user's function may raise anything
                self._failure = f"it raised {type(error).__name__}: {error}"
                continue
            if found:
                self._given = f"{self._name} gave notice" + (f": {found}" if isinstance(found, str) else "")
                return

    def close(self) -> None:
        """Stop calling the function. A call that hangs ends with this process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)


def load_hook(name: str, path: Sequence[str]) -> Hook | None:
    """Import the user's function.

    Args:
        name: dotted name; empty for none.
        path: where modules are found first, as for the script.

    Raises:
        OptionsError: there is no such function.
    """
    if not name:
        return None
    before = list(sys.path)
    sys.path[:0] = path
    module, _, function = name.rpartition(".")
    try:
        hook = getattr(import_module(module), function)
    except Exception as error:
        raise OptionsError(f"preemption_notice={name!r}: expected the dotted name of a function: {error}") from error
    finally:
        sys.path[:] = before
    if not callable(hook):
        raise OptionsError(f"preemption_notice={name!r}: expected the dotted name of a function, found {hook!r}")
    found: Hook = hook
    return found
