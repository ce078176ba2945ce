"""The CPU time of a rank: its training thread by section of a step, its mirror thread, and all other threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

BETWEEN, FORWARD, BACKWARD, OPTIMIZER = "between steps", "forward", "backward", "optimizer step"
"""The sections of a step: the first one contains `commit`, and the fetch of the next batch."""
MIRROR, OTHERS = "mirror thread", "other threads"
PARTS = (BETWEEN, FORWARD, BACKWARD, OPTIMIZER, MIRROR, OTHERS)


class CpuAccount:
    """What a process spends from the creation of this object on; used in the training thread."""

    def __init__(self) -> None:
        self._sections: defaultdict[str, float] = defaultdict(float)
        self._process_s = time.process_time()
        self._mirror_s = _mirror_s()
        self._began_s = self._until_s = time.thread_time()

    def end(self, section: str) -> None:
        """Count the CPU time of the training thread since the end of the last section in this one."""
        now_s = time.thread_time()
        self._sections[section] += now_s - self._until_s
        self._until_s = now_s

    def spent(self) -> dict[str, float]:
        """Return the seconds of each part, together those of the process. Called at the end of a section."""
        mirror_s = max(0.0, _mirror_s() - self._mirror_s)
        others_s = time.process_time() - self._process_s - (self._until_s - self._began_s) - mirror_s
        return {**self._sections, MIRROR: mirror_s, OTHERS: others_s}


def _mirror_s() -> float:
    """CPU time of the mirror thread; a changed layout comes with a new one."""
    threads = [thread.ident for thread in threading.enumerate() if thread.name == "ckptless-mirror"]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads if ident is not None)
