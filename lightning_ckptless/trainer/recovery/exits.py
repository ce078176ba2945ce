"""Ways out of a worker that Lightning does not hear of: no `on_exception`, no run marked as failed, no checkpoint."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_process() -> NoReturn:
    """End this process as failed, at once; what was printed is kept."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
