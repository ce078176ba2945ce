"""Time what the strategy does in each step, by wrapping its public methods on the instance."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ckptless.protocol.versions import Version


class Stopwatch:
    """Times of the training thread and of the mirror thread, step by step.

    Args:
        engine: the engine of a strategy that is training.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.times: dict[str, list[float]] = {}
        self.mirror_cpu_s: float | None = None
        engine.session.probes.append(self._probe)

    def attach(self) -> None:
        """Wrap what is not wrapped yet; a changed layout comes with a new mirror."""
        engine = self.engine
        self._wrap(engine.running.boundaries, "commit", "commit")
        self._wrap(engine, "at_batch_start", "stamp")
        self._wrap(engine, "before_optimizer_step", "wait")
        if (mirror := engine.running.mirroring.mirror) is not None:
            self._wrap(mirror, "submit", "submit", returned="stall_s")

    def take(self) -> dict[str, Any]:
        """Return all times since the last call, and the current sizes."""
        times, self.times = self.times, {}
        if (mirror := self.engine.running.mirroring.mirror) is None:
            return times
        rounds, slots = max(1, mirror.stats.committed), self.engine.session.arena.path.glob("shard-*")
        return times | {
            "staged_bytes": mirror.stats.staged_bytes // rounds,
            "sent_bytes": mirror.stats.sent_bytes // rounds,
            # Shared memory used by the slots of all ranks of this node.
            "arena_bytes": sum(path.stat().st_blocks * 512 for path in slots),
        }

    def _wrap(self, owner: Any, method: str, name: str, *, returned: str | None = None) -> None:
        inner: Callable[..., Any] = getattr(owner, method)
        if getattr(inner, "timed", False):
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.thread_time()
            result = inner(*args, **kwargs)
            self._add(f"{name}_s", time.perf_counter() - began)
            self._add(f"{name}_cpu_s", time.thread_time() - cpu_began)
            if returned is not None:
                self._add(returned, result)
            return result

        timed.timed = True  # type: ignore[attr-defined]
        setattr(owner, method, timed)

    def _add(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def _probe(self, moment: str, _version: Version) -> None:
        """Record the times of a round; runs in the mirror thread."""
        if moment == "committed":
            stats, cpu_s = self.engine.running.mirroring.mirror.stats, time.thread_time()
            if self.mirror_cpu_s is not None:
                self._add("mirror_cpu_s", max(0.0, cpu_s - self.mirror_cpu_s))
            self.mirror_cpu_s = cpu_s
            self._add("stage_s", stats.last_stage_s)
            self._add("round_s", stats.last_round_s)
