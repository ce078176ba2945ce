"""The strategy for sharded models: `ModelParallelStrategy` whose mesh moves to each generation's process groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

from torch.distributed.constants import default_pg_timeout

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.model_parallel import (
    PRECISIONS,
    fit_mesh,
    give_mesh,
    has_mesh,
    make_mesh,
    precision_of,
    sizes_of,
)
from lightning_ckptless.internals.lightning.strategy import LightningModelParallel
from lightning_ckptless.internals.mesh_internals import (
    become,
    forget_iteration,
    number_groups_from,
    obstacle_to_resharding,
    one_by_one,
)
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
from lightning_ckptless.trainer.elastic.world_change import resize_sharded_state
from lightning_ckptless.trainer.state.sharding import sharded_modules
from lightning_ckptless.trainer.strategy.recoverable import CkptlessMixin, options_of

FIRST_GROUP_OF_MESH = 1000
"""Number of the first process group of a mesh; groups for other purposes have lower numbers, in any order."""


class ModelParallelMixin(CkptlessMixin, LightningModelParallel):
    """Sharded models that survive the loss of any rank: FSDP2 (`fully_shard`), tensor parallelism, and both.

    Each distinct shard of a tensor is mirrored once, by one of the ranks that hold it, into host memory of peers
    in other failure domains. The model's `configure_model()` shards it over `self.device_mesh`.

    Args:
        data_parallel_size: ranks in the data-parallel dimension of the mesh; `auto` is the number of nodes.
        tensor_parallel_size: ranks in the tensor-parallel dimension; `auto` is the number of ranks per node.
        save_distributed_checkpoint: write a checkpoint as a folder with one file per rank; else rank 0 gathers it.
        process_group_backend: backend of the process groups, e.g. `nccl` or `gloo`; None to choose by device.
        timeout: time limit of collectives.
    """

    strategy_name = "ckptless_model_parallel"
    replicates = False

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
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            options_of(locals()),
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def place_among_virtual_ranks(self) -> tuple[int, int, int]:
        """This rank's index in the data-parallel dimension, the size of that dimension, and ranks per index."""
        _, width = sizes_of(self)
        return self.global_rank // width, self.world_size // width, width

    def requested_virtual_ranks(self) -> int:
        """Size of the data-parallel dimension when all requested ranks are present."""
        return int(self.num_nodes * self.num_processes // sizes_of(self)[1])

    def mesh_sizes(self) -> tuple[int, int] | None:
        """Ranks in each dimension of the device mesh."""
        return sizes_of(self)

    def check_options(self) -> None:
        """Check the mesh against the number of ranks, and the precision.

        Raises:
            OptionsError: the mesh does not match, or the precision is not supported.
        """
        if has_mesh(self):
            # The mesh of an earlier fit, which may have lost nodes since.
            return
        sizes, ranks = sizes_of(self), self.num_nodes * self.num_processes
        if math.prod(sizes) != ranks:
            raise OptionsError(
                f"data_parallel_size={sizes[0]} x tensor_parallel_size={sizes[1]} makes a mesh of "
                f"{math.prod(sizes)} ranks, but Trainer(num_nodes={self.num_nodes}, devices={self.num_processes}) "
                f"has {ranks}: choose sizes whose product is {ranks}"
            )
        if (precision := precision_of(self)) not in PRECISIONS:
            raise OptionsError(
                f"precision={precision!r} is not supported for sharded models: choose among {', '.join(PRECISIONS)}"
            )
        if self.options.device_tier == "on":
            raise OptionsError(
                f"device_tier='on' needs a state that all ranks replicate, but {type(self).__name__} shards the model: "
                "set device_tier='off', or use CkptlessStrategy"
            )
        if self.options.checkpoint_hooks != "never":
            raise OptionsError(
                f"checkpoint_hooks={self.options.checkpoint_hooks!r} would gather a sharded model with each "
                "version: set checkpoint_hooks='never', and keep such state in plain attributes or state_dict()"
            )

    def setup_environment(self) -> None:
        """Set up the process as Lightning does, but keep one mesh for all calls, which later generations reuse."""
        if give_mesh(self):
            return
        self.join_generation()
        fit_mesh(self)
        with self.world.making():
            super().setup_environment()

    def _setup_distributed(self) -> None:
        if self.join_generation():
            super()._setup_distributed()
        else:
            self.world.pretend(self.global_rank, self.world_size)
        number_groups_from(FIRST_GROUP_OF_MESH)

    def obstacle_to_another_world(self) -> str:
        """Why the model could not continue with another number of ranks; empty if it can."""
        model = self.lightning_module
        return obstacle_to_resharding(sharded_modules(model), model.parameters(), self.device_mesh)

    def use_new_groups(self) -> None:
        """Move the mesh, and the modules sharded over it, to the groups of the new generation.

        If the world size or this rank's place in the mesh has changed, reshards the tensors in place.

        Raises:
            LayoutMismatchError: a tensor cannot be sharded over the current ranks.
        """
        fit_mesh(self)
        number_groups_from(FIRST_GROUP_OF_MESH)
        with self.world.making(), one_by_one():
            rebuilt = make_mesh(self)
        mesh, modules = self.device_mesh, sharded_modules(self.lightning_module)
        has_moved = become(mesh, rebuilt)
        forget_iteration(modules)
        for parameter in self.lightning_module.parameters():
            parameter.grad = None
        if has_moved:
            resize_sharded_state(self.lightning_module.trainer, modules, mesh)
