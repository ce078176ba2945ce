"""Options of the strategy, validated before anything starts."""

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
    """Fault tolerance settings.

    Args:
        mirror_every_n_steps: optimizer steps between mirrored versions; `auto` chooses by measured cost.
        copies: replicas of each shard, besides the source rank's own copy.
        failure_domain: unit that fails as a whole; replicas are kept in other domains. `node`, `rank`, a dimension of
            the device mesh, or a custom level such as `rack`.
        arena_dir: directory of the arenas; None for `/dev/shm`, or a temporary directory if that does not exist.
        max_recoveries_without_progress: recoveries without a newly committed step after which the run gives up.
        max_recoveries_per_hour: recoveries within one hour after which the run gives up.
        on_unrecoverable: what to do if no complete version is left: resume from the newest checkpoint file, or raise.
        checksum: checksum algorithm that protects every replica.
        on_late: what to do if the previous mirror is still in progress: wait for it, or skip a version.
        staging: whether copying the state overlaps the next forward and backward pass, or blocks it.
        arena_keep_s: seconds to keep the arena of a dead run for a restart with the same run id.
        mirror_budget: with `auto`, the largest share by which mirroring may lengthen training.
        failures_per_day: with `auto`, the expected number of failures of the whole run per day.
        in_place: after a fault, replace only the lost ranks while the others stay in `fit`; else relaunch all ranks.
        standbys: processes per node that have run the script up to `fit` and wait there to replace a lost rank.
        preload_imports: import the modules that the script uses in training once, in the fork server, for all new
            processes.
        hang_timeout_s: seconds without progress on any rank after which the ranks that are furthest behind are killed
            as hung; None derives the limit from step times, 0 disables it.
        health_check: dotted name of a function that raises if a node is unfit to train; it is called in addition to
            the built-in checks, before a worker joins the others.
        durable_every_n_steps: optimizer steps between durable states; None disables the step schedule.
        durable_every_s: seconds between durable states; None disables the time schedule.
        durable_dir: directory of the durable states; None for `durable` in the run folder.
        durable_keep: number of durable states to keep.
        elastic_batch: after a world change, keep the global batch, or use one batch per rank.
        checkpoint_hooks: whether the script's `on_save_checkpoint` hooks are called for each version and its
            `on_load_checkpoint` hooks on each restore, or only by Lightning.
        stateless_callbacks: class names of callbacks whose `state_dict()` is not called for each version.
        trusted_classes: dotted names of classes that host state may contain when it is read from disk or another node.

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
        self._check_mirror_interval()
        self._check_durable()
        if not isinstance(self.failure_domain, str) or not re.fullmatch(_LEVEL, self.failure_domain):
            raise OptionsError(
                f"failure_domain={self.failure_domain!r}: expected node, rank, or a custom level, e.g. rack: "
                "lower-case letters, digits and _"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OptionsError(f"{name}={value!r}: expected an integer of at least {least}")
        if self.hang_timeout_s is not None and self.hang_timeout_s < 0:
            raise OptionsError(f"hang_timeout_s={self.hang_timeout_s!r}: expected seconds, 0 to disable, or None")
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

    def _check_mirror_interval(self) -> None:
        every = self.mirror_every_n_steps
        if every != "auto" and (not isinstance(every, int) or every < 1):
            raise OptionsError(f"mirror_every_n_steps={every!r}: expected an integer of at least 1, or 'auto'")
        if every == "auto" and self.on_late == "skip":
            raise OptionsError(
                "mirror_every_n_steps='auto' measures how long training waits for a mirror, but with on_late='skip' "
                "it never waits: choose one of the two"
            )
        if not 0 < self.mirror_budget <= 1:
            raise OptionsError(f"mirror_budget={self.mirror_budget!r}: expected a share in (0, 1], e.g. 0.01")
        if not self.failures_per_day > 0:
            raise OptionsError(f"failures_per_day={self.failures_per_day!r}: expected a number greater than 0")

    def _check_durable(self) -> None:
        n, every_s = self.durable_every_n_steps, self.durable_every_s
        if n is not None and (not isinstance(n, int) or n < 1):
            raise OptionsError(f"durable_every_n_steps={n!r}: expected an integer of at least 1, or None")
        if every_s is not None and not every_s > 0:
            raise OptionsError(f"durable_every_s={every_s!r}: expected seconds greater than 0, or None")
