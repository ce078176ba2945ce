"""Exits from a worker that Lightning does not notice: no `on_exception`, no run marked as failed, no checkpoint."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_process() -> NoReturn:
    """Exit at once with status 1, after flushing stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
