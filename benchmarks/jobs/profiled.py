"""Profile what the strategy does in the training thread and in the mirror thread, function by function.

Apart from the stopwatch, because a profiler makes every call slower: times are only compared with each other.
"""

from __future__ import annotations

import cProfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_ckptless
from benchmarks.jobs.stopwatch import Stopwatch

ROOT = Path(lightning_ckptless.__file__).parent
TRAINING, MIRROR = "training thread", "mirror thread"


class Profiled(Stopwatch):
    """A stopwatch that profiles as well.

    Args:
        engine: the engine of a strategy that is training.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._profiles = {TRAINING: cProfile.Profile(), MIRROR: cProfile.Profile()}
        self._versions = 0

    def attach(self) -> None:
        """Profile what is not profiled yet."""
        engine = self.engine
        self._profile(engine.running.boundaries, "commit", TRAINING)
        for method in ("at_batch_start", "before_optimizer_step", "beat"):
            self._profile(engine, method, TRAINING)
        if (mirror := engine.running.mirroring.mirror) is not None:
            self._profile(mirror, "_run", MIRROR)
        super().attach()

    def take(self) -> dict[str, Any]:
        """Return what the stopwatch returns, and the calls and seconds of each part of the package since then."""
        found = super().take()
        versions, self._versions = self._versions, 0
        profiles = {thread: _by_part(profile) for thread, profile in self._profiles.items()}
        for profile in self._profiles.values():
            profile.clear()
        return found | {"versions": versions, "profiles": profiles}

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


def _by_part(profile: cProfile.Profile) -> dict[str, tuple[int, int, float]]:
    """Return calls of functions, of built-in functions, and seconds, by the file whose code makes the calls."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for entry in profile.getstats():
        if isinstance(entry.code, str):
            continue
        part = found[_part_of(entry.code.co_filename)]
        part[0] += entry.callcount
        part[2] += entry.inlinetime
        for call in entry.calls or ():
            if isinstance(call.code, str):
                part[1] += call.callcount
                part[2] += call.inlinetime
    return {name: (int(calls), int(built_in), took_s) for name, (calls, built_in, took_s) in found.items()}


def _part_of(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).with_suffix("").as_posix()
    library = next((name for name in ("lightning", "torch", "torchmetrics") if f"/{name}/" in file), "")
    return library or "Python's library"
