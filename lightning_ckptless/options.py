"""What a user can set on the strategy, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_ckptless.errors import OptionsError

EveryNSteps = int | Literal["auto"]
OnLate = Literal["wait", "skip"]
OnUnrecoverable = Literal["durable", "raise"]
Checksum = Literal["xxh3", "crc32", "none"]
Staging = Literal["overlap", "blocking"]
ElasticBatch = Literal["keep", "scale"]
CheckpointHooks = Literal["never", "every_version"]

_DOTTED = r"[^\W\d]\w*(\.\w+)+"
_LEVEL = "[a-z][a-z0-9_]*"
_LEAST = {
    "copies": 0,
    "max_recoveries_without_progress": 0,
    "max_recoveries_per_hour": 0,
    "standbys": 0,
    "durable_keep": 1,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "on_late": ("wait", "skip"),
    "on_unrecoverable": ("durable", "raise"),
    "checksum": ("xxh3", "crc32", "none"),
    "staging": ("overlap", "blocking"),
    "elastic_batch": ("keep", "scale"),
    "checkpoint_hooks": ("never", "every_version"),
}


@dataclass(frozen=True, slots=True)
class CkptlessOptions:
    """Settings of fault tolerance.

    Args:
        mirror_every_n_steps: optimizer steps between two mirrored versions; `auto` to choose by what they cost.
        copies: replicas of each shard beyond the writer's own copy.
        failure_domain: what is lost together; replicas are kept in other domains. `node`, `rank`, a dimension of the
            mesh, or a level that you name, e.g. `rack`.
        arena_dir: folder for the arenas; None for `/dev/shm`, or a temporary folder where that is missing.
        max_recoveries_without_progress: recoveries with no new step committed between them, after which the run gives
            up: it comes back to the same fault.
        max_recoveries_per_hour: recoveries within an hour, after which the run gives up.
        on_unrecoverable: with no complete version left, go on from the newest checkpoint file or raise.
        checksum: digest that guards every replica.
        on_late: when the last mirror is still under way at the next one, wait for it or skip a version.
        staging: copy the state while the next forward and backward run, or before they start.
        arena_keep_s: seconds for which the arena of a dead run is kept for a restart under the same run id.
        mirror_budget: with `auto`, by which share mirroring may lengthen training at most.
        failures_per_day: with `auto`, how many failures of the whole run are expected.
        in_place: after a fault replace only what was lost and let the other ranks go on; else start all again.
        standbys: processes per node that have run the script up to `fit` and wait there for a rank.
        preload_imports: have what the program has imported when it trains imported once for all new processes, in the
            process that they are forked from.
        hang_timeout_s: seconds without progress of any rank after which those that have come least far are ended as
            hung; None to learn it from the steps, 0 for never.
        health_check: dotted name of a function of yours that raises where a node is not fit to train; it is called,
            beside our own checks, before a worker joins the others.
        durable_every_n_steps: optimizer steps from one durable state to the next; None for none by steps.
        durable_every_s: seconds from one durable state to the next; None for none by time.
        durable_dir: folder of the durable states; None for `durable` in the run's own folder.
        durable_keep: durable states that are kept.
        elastic_batch: with another number of ranks, keep the samples of a step together, or take one batch per rank.
        checkpoint_hooks: whether the program's `on_save_checkpoint` hooks are called with each version, and
            `on_load_checkpoint` when one is restored, or only when Lightning calls them.
        stateless_callbacks: class names of callbacks whose `state_dict()` is not called with each version.
        trusted_classes: dotted names of classes that small states may hold which leave the memory of their machine.

    Raises:
        OptionsError: a value is out of range.
    """

    mirror_every_n_steps: EveryNSteps = 1
    copies: int = 1
    failure_domain: str = "node"
    arena_dir: Path | None = None
    max_recoveries_without_progress: int = 10
    max_recoveries_per_hour: int = 100
    on_unrecoverable: OnUnrecoverable = "durable"
    checksum: Checksum = "xxh3"
    on_late: OnLate = "wait"
    staging: Staging = "overlap"
    arena_keep_s: float = 3600.0
    in_place: bool = True
    standbys: int = 0
    preload_imports: bool = True
    hang_timeout_s: float | None = None
    health_check: str = ""
    mirror_budget: float = 0.01
    failures_per_day: float = 1.0
    durable_every_n_steps: int | None = None
    durable_every_s: float | None = None
    durable_dir: Path | None = None
    durable_keep: int = 2
    elastic_batch: ElasticBatch = "keep"
    checkpoint_hooks: CheckpointHooks = "never"
    stateless_callbacks: Sequence[str] = ()
    trusted_classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("arena_dir", "durable_dir"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(folder))
        self._check_cadence()
        self._check_durable()
        if not isinstance(self.failure_domain, str) or not re.fullmatch(_LEVEL, self.failure_domain):
            raise OptionsError(
                f"failure_domain={self.failure_domain!r}: expected node, rank, or the name of a level of your own, "
                "e.g. rack: lower-case letters, digits and _"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OptionsError(f"{name}={value!r}: expected a whole number of at least {least}")
        if self.hang_timeout_s is not None and self.hang_timeout_s < 0:
            raise OptionsError(f"hang_timeout_s={self.hang_timeout_s!r}: expected seconds, 0 for never, or None")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise OptionsError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        names = self.stateless_callbacks
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise OptionsError(f"stateless_callbacks={names!r}: expected a list of class names, e.g. ['SlowMonitor']")
        names = self.trusted_classes
        if isinstance(names, str) or not all(isinstance(name, str) and re.fullmatch(_DOTTED, name) for name in names):
            raise OptionsError(
                f"trusted_classes={names!r}: expected a list of dotted names, e.g. ['mylab.data.Cursor']"
            )

    def _check_cadence(self) -> None:
        every = self.mirror_every_n_steps
        if every != "auto" and (not isinstance(every, int) or every < 1):
            raise OptionsError(f"mirror_every_n_steps={every!r}: expected a whole number of at least 1, or 'auto'")
        if every == "auto" and self.on_late == "skip":
            raise OptionsError(
                "mirror_every_n_steps='auto' measures how long training waits, and on_late='skip' never does: take one"
            )
        if not 0 < self.mirror_budget <= 1:
            raise OptionsError(f"mirror_budget={self.mirror_budget!r}: expected a share above 0, at most 1, e.g. 0.01")
        if not self.failures_per_day > 0:
            raise OptionsError(f"failures_per_day={self.failures_per_day!r}: expected a number above 0")

    def _check_durable(self) -> None:
        n, every_s = self.durable_every_n_steps, self.durable_every_s
        if n is not None and (not isinstance(n, int) or n < 1):
            raise OptionsError(f"durable_every_n_steps={n!r}: expected a whole number of at least 1, or None for never")
        if every_s is not None and not every_s > 0:
            raise OptionsError(f"durable_every_s={every_s!r}: expected seconds, more than 0, or None for never")
