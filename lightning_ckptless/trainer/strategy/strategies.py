"""The strategies that users name."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.distributions import DISTRIBUTIONS
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.ddp import wrap_late
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.internals.lightning.model_parallel import (
    PRECISIONS,
    fit_mesh,
    give_mesh,
    has_mesh,
    make_mesh,
    precision_of,
    sizes_of,
)
from lightning_ckptless.internals.mesh_internals import (
    become,
    forget_iteration,
    number_groups_from,
    obstacle_to_resharding,
    one_by_one,
)
from lightning_ckptless.internals.torch_internals import bucket_layout, set_bucket_layout, use_process_group
from lightning_ckptless.membership.worker.process_groups import world_group
from lightning_ckptless.trainer.elastic.world_change import resize_sharded_state
from lightning_ckptless.trainer.state.gradient_buckets import note_summed
from lightning_ckptless.trainer.state.sharding import sharded_modules
from lightning_ckptless.trainer.strategy.recoverable import recoverable

FIRST_GROUP_OF_MESH = 1000
"""Number of the first process group of a mesh; groups for other purposes have lower numbers, in any order."""


def strategy_class(distribution: str, name: str = "ckptless") -> type[Any]:
    """Make a strategy class for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        name: `ckptless_model_parallel`, or any name of the data-parallel strategy.
    """
    made = (model_parallel_class if name == "ckptless_model_parallel" else data_parallel_class)(distribution)
    made.__module__, made.__qualname__ = "lightning_ckptless", made.__name__
    return made


@lru_cache(maxsize=len(DISTRIBUTIONS))
def data_parallel_class(distribution: str) -> type[Any]:
    """Make `CkptlessStrategy` for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(distribution, "strategies").DDPStrategy, distribution)

    class CkptlessStrategy(base):  # type: ignore[misc]
        """Data parallelism that survives the loss of any rank.

        After every optimizer step the training state is mirrored, in shards, into host memory of peers in other failure
        domains. When a worker dies, a new process replaces it and the other ranks roll back to the last step; if that
        is impossible, all ranks are relaunched. Training resumes from the arenas, bit for bit.
        """

        strategy_name = "ckptless_ddp"

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

    return CkptlessStrategy


@lru_cache(maxsize=len(DISTRIBUTIONS))
def model_parallel_class(distribution: str) -> type[Any]:
    """Make `CkptlessModelParallelStrategy` for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(distribution, "strategies").ModelParallelStrategy, distribution)

    class CkptlessModelParallelStrategy(base):  # type: ignore[misc]
        """Sharded models that survive the loss of any rank: FSDP2 (`fully_shard`), tensor parallelism, and both.

        Each distinct shard of a tensor is mirrored once, by one of the ranks that hold it, into host memory of peers
        in other failure domains. The model's `configure_model()` shards it over `self.device_mesh`.
        """

        strategy_name = "ckptless_model_parallel"
        replicates = False

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

    return CkptlessModelParallelStrategy
