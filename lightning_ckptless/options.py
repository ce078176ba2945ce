"""The options of the strategies, in groups. Each is declared here and nowhere else: see `configuration/option.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_ckptless import environment
from lightning_ckptless.configuration.option import Options, option
from lightning_ckptless.configuration.ranges import constant, integer, number, positive, share, text, texts
from lightning_ckptless.errors import OptionsError

EveryNSteps = int | Literal["auto"]
OnLate = Literal["wait", "skip"]
OnUnrecoverable = Literal["durable", "raise"]
Checksum = Literal["xxh3", "crc32", "none"]
Replicas = Literal["verify", "send"]
OnDivergence = Literal["heal", "rewind", "raise", "warn"]
Staging = Literal["overlap", "blocking", "device"]
ElasticBatch = Literal["keep", "scale"]
DeviceTierMode = Literal["on", "off"]
CheckpointHooks = Literal["never", "every_version"]

_DOTTED = r"[^\W\d]\w*(\.\w+)+"
_LEVEL = "[a-z][a-z0-9_]*"


@dataclass(frozen=True, kw_only=True)
class MirrorOptions(Options):
    """When a version is taken, and how it is copied."""

    mirror_every_n_steps: EveryNSteps = option(
        1,
        "optimizer steps between mirrored versions; `auto` chooses by measured cost",
        integer(least=1) | constant("auto"),
        unit="optimizer steps",
    )
    mirror_budget: float = option(
        0.01,
        "with `mirror_every_n_steps='auto'`, the largest share by which mirroring may lengthen training",
        share(),
    )
    failures_per_day: float = option(
        1.0,
        "with `mirror_every_n_steps='auto'`, the expected number of failures of the whole run per day",
        positive(),
    )
    on_late: OnLate = option(
        "wait",
        "what to do if the previous version is still being copied at the next commit point: `wait` for it, or `skip` "
        "the new version",
    )
    staging: Staging = option(
        "overlap",
        "when the state is copied: `overlap` during the next forward and backward pass, `blocking` before them, "
        "`device` before them into a buffer in device memory, and from there during as many steps as it takes",
    )
    checksum: Checksum = option("xxh3", "algorithm of the checksum that protects every replica")
    replicas: Replicas | None = option(
        None,
        "how a holder gets tensors that it has itself: `verify` copies its own and compares the checksum with the "
        "source's at every version, `send` sends the source's",
        none="`verify`, or `send` with `checksum='none'`",
    )
    on_divergence: OnDivergence = option(
        "heal",
        "what to do if replicas, or gradients in a replay check, differ: `rewind` goes back to the last version on "
        "which all agreed and replays, `heal` does too and replaces a rank that is wrong again, `raise` ends the run, "
        "`warn` continues, and sends replicas that differ from then on",
    )
    history: int = option(
        0,
        "earlier versions kept in memory, to which the run can be rewound; each needs as much memory as one version",
        integer(least=0),
        unit="versions",
    )
    history_every: int = option(
        1, "optimizer steps between two versions of the history", integer(least=1), unit="optimizer steps"
    )

    replay_check_every: int | None = option(
        None,
        "optimizer steps between two replay checks, in which another rank runs each rank's micro-batch again and "
        "compares the gradients",
        integer(least=1),
        unit="optimizer steps",
        none="no check",
    )
    device_tier: DeviceTierMode = option(
        "off",
        "whether every version is also kept in device memory, in the ranks' processes; the arenas then need a version "
        "only every `mirror_every_n_steps`",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mirror_every_n_steps == "auto" and self.on_late == "skip":
            raise OptionsError(
                "mirror_every_n_steps='auto' measures how long training waits for a mirror, but with on_late='skip' "
                "it never waits: choose one of the two"
            )
        if self.replicas == "verify" and self.checksum == "none":
            raise OptionsError(
                "replicas='verify' compares checksums, but checksum='none' computes none: choose another checksum, or "
                "replicas='send'"
            )
        if self.replay_check_every is not None and self.on_divergence in ("heal", "rewind"):
            self._require_reach(self.replay_check_every)

    def _require_reach(self, steps: int) -> None:
        """Refuse a history that may lack the versions from before the last replay check."""
        reach = (self.history - 1) * self.history_every + 2 if self.history else 0
        if reach < steps:
            raise OptionsError(
                f"replay_check_every={steps} with on_divergence='{self.on_divergence}' goes back to the last check "
                f"that agreed, {steps} steps ago, but history={self.history} and history_every={self.history_every} "
                f"reach back {reach} steps: set history=2 and history_every={steps}, or on_divergence='raise'"
            )

    @property
    def verifies_replicas(self) -> bool:
        """Whether holders copy their own tensors and compare checksums."""
        return self.replicas != "send" and self.checksum != "none"


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions(Options):
    """How many replicas there are, and where."""

    copies: int = option(1, "replicas of each shard, besides the source rank's own copy", integer(least=0))
    failure_domain: str = option(
        "node",
        "unit that fails as a whole; replicas are kept in other domains: `node`, `rank`, a dimension of the device "
        "mesh, or a custom level such as `rack`",
        text(_LEVEL, "node, rank, or a custom level, e.g. rack: lower-case letters, digits and underscores"),
    )
    arena_dir: Path | None = option(
        None,
        "folder of the arenas, the shared memory that holds the replicas",
        none="`CKPTLESS_ARENA_DIR`, else `/dev/shm`, else a temporary folder",
    )
    arena_keep_s: float = option(
        3600.0, "seconds to keep the arena of a dead run for a restart with the same run id", number(0), unit="seconds"
    )


@dataclass(frozen=True, kw_only=True)
class StateOptions(Options):
    """What a version contains."""

    checkpoint_hooks: CheckpointHooks = option(
        "never",
        "`every_version` calls the script's `on_save_checkpoint` hooks for each version and its `on_load_checkpoint` "
        "hooks on each restore; `never` leaves them to Lightning",
    )
    stateless_callbacks: Sequence[str] = option(
        (),
        "callbacks, by class name or dotted path, whose `state_dict()` is not called for each version",
        texts(r"(?s:.*)", "a list of class names, e.g. ['SlowMonitor']"),
    )
    trusted_classes: Sequence[str] = option(
        (),
        "classes, by dotted name, that host state may contain besides plain data where it goes to disk or to another "
        "node",
        texts(_DOTTED, "a list of dotted names, e.g. ['mylab.data.Cursor']"),
    )


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions(Options):
    """What happens after a fault, and what counts as one."""

    in_place: bool = option(
        True,
        "whether only the lost ranks are replaced after a fault, while the others stay in `fit`; else all ranks are "
        "relaunched",
    )
    standbys: int = option(
        0,
        "processes per node that have run the script up to `fit` and wait there to replace a lost rank",
        integer(least=0),
    )
    preload_imports: bool = option(
        True,
        "whether the modules that the script uses in training are imported once, in the fork server, for all new "
        "processes",
    )
    hang_timeout_s: float | None = option(
        None,
        "seconds without progress on any rank after which the ranks that are furthest behind are killed as hung; 0 "
        "disables hang detection",
        number(0),
        unit="seconds",
        none="a limit learned from the run",
    )
    health_check: str = option(
        "",
        "dotted name of a function that raises if its node is unfit to train; called in addition to the built-in "
        "checks, before a worker joins the others",
        text(f"({_DOTTED})?", "the dotted name of a function, e.g. 'mycluster.checks.network'"),
    )
    max_recoveries_without_progress: int = option(
        10, "recoveries without a newly committed step after which the run gives up", integer(least=0)
    )
    max_recoveries_per_hour: int = option(
        100, "recoveries within one hour after which the run gives up", integer(least=0)
    )
    on_unrecoverable: OnUnrecoverable = option(
        "durable",
        "what to do if no complete version is left: `durable` resumes from the newest durable state or checkpoint "
        "file, `raise` ends the run",
    )


@dataclass(frozen=True, kw_only=True)
class DrainOptions(Options):
    """When work is moved off a node or a rank automatically."""

    health_check_every_s: float | None = option(
        None,
        "seconds between two health checks of a node while it trains; a node that fails one is drained",
        positive(),
        unit="seconds",
        none="no check while it trains",
    )
    drain_stragglers_after_s: float | None = option(
        None,
        "seconds for which a rank must be a straggler until another process takes it",
        number(0),
        unit="seconds",
        none="a report only",
    )
    straggler_factor: float = option(
        1.5,
        "own time per step from which a rank is a straggler, as a multiple of the median of its node's other ranks",
        number(1),
    )


@dataclass(frozen=True, kw_only=True)
class DurableOptions(Options):
    """Versions that are also written to storage."""

    durable_every_n_steps: int | None = option(
        None,
        "optimizer steps between durable states, which are written in the background",
        integer(least=1),
        unit="optimizer steps",
        none="no schedule by steps",
        variable=environment.DURABLE_EVERY_N_STEPS,
    )
    durable_every_s: float | None = option(
        None,
        "seconds between durable states",
        positive(),
        unit="seconds",
        none="no schedule by time",
        variable=environment.DURABLE_EVERY_S,
    )
    durable_dir: Path | None = option(
        None, "folder of the durable states", none="`durable` in the run folder", variable=environment.DURABLE_DIR
    )
    durable_keep: int = option(2, "number of durable states to keep", integer(least=1))


@dataclass(frozen=True, kw_only=True)
class ElasticOptions(Options):
    """Training with another number of ranks than at the start."""

    elastic_batch: ElasticBatch = option(
        "keep",
        "what a step consists of with fewer ranks than at the start: `keep` runs the batches of the missing ranks on "
        "the others, `scale` uses one batch per remaining rank",
    )


@dataclass(frozen=True, kw_only=True)
class CkptlessOptions(
    MirrorOptions, ReplicaOptions, StateOptions, RecoveryOptions, DrainOptions, DurableOptions, ElasticOptions
):
    """All options of a strategy.

    Raises:
        OptionsError: a value is out of range, or options exclude each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.health_check_every_s is not None and self.health_check.startswith("__main__."):
            raise OptionsError(
                f"health_check={self.health_check!r} with health_check_every_s={self.health_check_every_s:g}: another "
                "process calls the function while the script trains, so it has to be in a module of its own"
            )
        if self.device_tier == "on" and (why_not := self._obstacle_to_device_tier()):
            raise OptionsError(f"device_tier='on' {why_not}")

    def _obstacle_to_device_tier(self) -> str:
        if not self.in_place:
            return "has no effect with in_place=False: device memory is lost with the processes"
        if not self.copies:
            return "needs copies=1 or more: device memory ends with the process of the lost rank"
        if not self.verifies_replicas:
            return "keeps each holder's own tensors, which have to be compared: set replicas='verify', and a checksum"
        if self.on_divergence == "warn":
            return "cannot continue with replicas that differ: choose another value than on_divergence='warn'"
        if self.on_late == "skip":
            return "takes every version, but with on_late='skip' some are skipped: set on_late='wait'"
        if self.history:
            return f"keeps one version, which a rewind would leave behind: set history=0 instead of {self.history}"
        return ""
