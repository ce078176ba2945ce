"""News of processes that the kernel has killed for lack of memory.

A worker that the kernel kills so dies by SIGKILL, as one does that a user kills. Only its control group tells them
apart, and only by a count: so the count is looked at whenever a worker has died, by an object that knows the last one.
"""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.system.control_groups import PROC, control_group


class OomKills:
    """Tells when the kernel has killed processes of this one's control group for lack of memory.

    Args:
        proc: folder of this process; None for the real one.
    """

    def __init__(self, proc: Path | None = None) -> None:
        self._group = control_group("memory", proc or PROC)
        self._first = self._last = self._kills()

    def news(self) -> str:
        """How many it has killed since this object was made, in words; empty where none since the last call."""
        before, self._last = self._last, self._kills()
        if self._last <= before:
            return ""
        assert self._group is not None, "it has kills"
        count, limit_bytes = self._last - self._first, min((one.limit for one in self._group.ceilings()), default=None)
        limit = "has no limit of its own" if limit_bytes is None else f"is limited to {limit_bytes / (1 << 20):.0f} MiB"
        return (
            f"the kernel has killed {count} process(es) of cgroup {self._group.folder} for lack of memory since the "
            f"start (oom_kill was {self._first}, is {self._last}); its memory {limit}"
        )

    def _kills(self) -> int:
        return 0 if self._group is None else self._group.kills()
