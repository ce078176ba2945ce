"""Profile what the strategy does in the training thread and in the mirror thread, by file.

Apart from the stopwatch, because a profiler makes every call slower: times are only compared with each other.
"""

from __future__ import annotations

import cProfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_ckptless
from benchmarks.jobs.cpu_account import MIRROR
from benchmarks.jobs.stopwatch import Stopwatch

ROOT = Path(lightning_ckptless.__file__).parent
TRAINING = "training thread"


class Profiled(Stopwatch):
    """A stopwatch that profiles as well."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._profiles = {TRAINING: cProfile.Profile(), MIRROR: cProfile.Profile()}
        self._versions = 0

    def attach(self) -> None:
        """Profile what is not profiled yet."""
        self._profile(self.engine.running.boundaries, "commit", TRAINING)
        for method in ("at_batch_start", "before_optimizer_step", "beat"):
            self._profile(self.engine, method, TRAINING)
        if (mirror := self.engine.running.mirroring.mirror) is not None:
            self._profile(mirror, "_run", MIRROR)
        super().attach()

    def take(self) -> dict[str, Any]:
        """Return what the stopwatch returns, and the calls and seconds of each file since then."""
        found = super().take() | {"versions": self._versions, "profiles": {}}
        self._versions = 0
        for thread, profile in self._profiles.items():
            found["profiles"][thread] = by_file(profile)
            profile.clear()
        return found

    def _profile(self, owner: Any, method: str, thread: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)
        if getattr(inner, "timed", False):
            return
        profile = self._profiles[thread]

        def profiled(*args: Any, **kwargs: Any) -> Any:
            self._versions += method == "commit"
            profile.enable()
            try:
                return inner(*args, **kwargs)
            finally:
                profile.disable()

        profiled.timed = True  # type: ignore[attr-defined]
        setattr(owner, method, profiled)


def by_file(profile: cProfile.Profile) -> dict[str, list[float]]:
    """Return calls of functions, of built-in functions, and seconds, by the file whose code makes the calls."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for entry in profile.getstats():
        if isinstance(entry.code, str):
            continue
        part = found[_file_of(entry.code.co_filename)]
        built_in = [call for call in entry.calls or () if isinstance(call.code, str)]
        part[0] += entry.callcount
        part[1] += sum(call.callcount for call in built_in)
        part[2] += entry.inlinetime + sum(call.inlinetime for call in built_in)
    return dict(found)


def _file_of(path: str) -> str:
    if Path(path).is_relative_to(ROOT):
        return Path(path).relative_to(ROOT).with_suffix("").as_posix()
    library = next((name for name in ("lightning", "torch", "torchmetrics") if f"/{name}/" in path), "")
    return library or "Python's library"
