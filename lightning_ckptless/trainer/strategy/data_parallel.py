"""The data-parallel strategy: `DDPStrategy` whose gradients are reduced in the process groups of each generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, Unpack

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.internals.lightning.ddp import wrap_late
from lightning_ckptless.internals.lightning.strategy import DataParallelArguments, LightningDataParallel
from lightning_ckptless.internals.torch_internals import bucket_layout, set_bucket_layout, use_process_group
from lightning_ckptless.membership.worker.process_groups import world_group
from lightning_ckptless.options import (
    CheckpointHooks,
    Checksum,
    DeviceTierMode,
    ElasticBatch,
    EveryNSteps,
    OnDivergence,
    OnLate,
    OnUnrecoverable,
    Replicas,
    Staging,
)
from lightning_ckptless.trainer.state.gradient_buckets import note_summed
from lightning_ckptless.trainer.strategy.recoverable import CkptlessMixin, options_of

Init = TypeVar("Init", bound=Callable[..., None])


def followed_at_runtime(init: Init) -> Init:
    """Annotate the arguments for Lightning's class as `Any` at runtime.

    Type checkers see a typed dictionary. `LightningCLI` follows arguments without a type into the constructors of
    Lightning and torch, where it also finds defaults and descriptions.
    """
    init.__annotations__["base_options"] = Any
    return init


class DataParallelMixin(CkptlessMixin, LightningDataParallel):
    """Data parallelism that survives the loss of any rank.

    After every optimizer step the training state is mirrored, in shards, into host memory of peers in other failure
    domains. When a worker dies, a new process replaces it and the other ranks roll back to the last step; if that
    is impossible, all ranks are relaunched. Training resumes from the arenas, bit for bit.
    """

    strategy_name = "ckptless_ddp"

    @followed_at_runtime
    def __init__(
        self,
        mirror_every_n_steps: EveryNSteps = 1,
        copies: int = 1,
        failure_domain: str = "node",
        arena_dir: str | Path | None = None,
        max_recoveries_without_progress: int = 10,
        max_recoveries_per_hour: int = 100,
        on_unrecoverable: OnUnrecoverable = "durable",
        checksum: Checksum = "xxh3",
        on_late: OnLate = "wait",
        staging: Staging = "overlap",
        arena_keep_s: float = 3600.0,
        in_place: bool = True,
        standbys: int = 0,
        preload_imports: bool = True,
        hang_timeout_s: float | None = None,
        health_check: str = "",
        mirror_budget: float = 0.01,
        failures_per_day: float = 1.0,
        durable_every_n_steps: int | None = None,
        durable_every_s: float | None = None,
        durable_dir: str | Path | None = None,
        durable_keep: int = 2,
        elastic_batch: ElasticBatch = "keep",
        checkpoint_hooks: CheckpointHooks = "never",
        stateless_callbacks: Sequence[str] = (),
        trusted_classes: Sequence[str] = (),
        history: int = 0,
        history_every: int = 1,
        health_check_every_s: float | None = None,
        drain_stragglers_after_s: float | None = None,
        straggler_factor: float = 1.5,
        replicas: Replicas | None = None,
        on_divergence: OnDivergence = "heal",
        device_tier: DeviceTierMode = "off",
        replay_check_every: int | None = None,
        **base_options: Unpack[DataParallelArguments],
    ) -> None:
        super().__init__(options_of(locals()), **base_options)

    def setup_distributed(self) -> None:
        """Join the current generation, then let Lightning do the rest of its setup."""
        if self.join_generation():
            super().setup_distributed()

    def configure_ddp(self) -> None:
        """Wrap the model once there is a process group that reduces its gradients."""
        if not self.is_alone:
            super().configure_ddp()
            note_summed(self.model)

    def without_sync(self) -> AbstractContextManager[Any]:
        """Context in which a backward pass does not reduce gradients over the ranks."""
        model: Any = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def sums_now(self) -> bool:
        """Whether a backward pass currently reduces gradients over the ranks."""
        return not isinstance(self.model, DistributedDataParallel) or self.model.require_backward_grad_sync

    def use_new_groups(self) -> None:
        """Reduce gradients in the new process group."""
        model: Any = self.model
        if isinstance(model, DistributedDataParallel):
            before = model.process_group.size()
            use_process_group(model, world_group())
            if before != self.world_size:
                # The divisor of the reduction is fixed when the buckets are made.
                set_bucket_layout(model, bucket_layout(model))
        else:
            wrap_late(self)
