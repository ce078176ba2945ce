"""What a recovery changes of its process, and exits that Lightning does not notice.

After such an exit there is no `on_exception`, no run marked as failed, and no checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import NoReturn

from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.worker import hidden_output


class CannotRecoverInPlaceError(Exception):
    """Raised in a recovery that cannot continue in this process; its message is the reason, for the agent."""


def leave_process(exit_code: int = 1) -> NoReturn:
    """Exit at once, after flushing stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """This process, as far as a recovery depends on it or changes it.

    Args:
        env: its environment variables.
        clock: its clock.
        leave: ends it at once.
        show_output: shows its output from now on, if it was hidden.
    """

    env: MutableMapping[str, str] = field(default_factory=lambda: os.environ)
    clock: Clock = field(default_factory=Clock)
    leave: Callable[[], NoReturn] = leave_process
    show_output: Callable[[], object] = hidden_output.show


THIS_PROCESS = OwnProcess()
