"""The strategies that users name."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.ddp import wrap_late
from lightning_ckptless.internals.lightning.distribution import DISTRIBUTIONS, module
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
"""Number of the first process group of a mesh: those for other ends come before it, in whatever order."""


def strategy_class(distribution: str, name: str = "ckptless") -> type[Any]:
    """A strategy for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        name: `ckptless_model_parallel`, or any name of data parallelism.
    """
    made = (model_parallel_class if name == "ckptless_model_parallel" else data_parallel_class)(distribution)
    made.__module__, made.__qualname__ = "lightning_ckptless", made.__name__
    return made


@lru_cache(maxsize=len(DISTRIBUTIONS))
def data_parallel_class(distribution: str) -> type[Any]:
    """`CkptlessStrategy` for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(distribution, "strategies").DDPStrategy, distribution)

    class CkptlessStrategy(base):  # type: ignore[misc]
        """Data parallelism that survives the loss of any rank.

        After every optimizer step the state of training is mirrored, in shards, into host memory of peers in other
        failure domains. When a worker dies, a new process takes its place and the others go back to the last step;
        where that is not possible all are started again. Training goes on from what the arenas hold, bit for bit.
        """

        strategy_name = "ckptless_ddp"

        def setup_distributed(self) -> None:
            """Join the current generation, then let Lightning do the rest of its set-up."""
            if self.join_generation():
                super().setup_distributed()

        def configure_ddp(self) -> None:
            """Wrap the model, once there is a process group to sum its gradients in."""
            if not self.is_alone:
                super().configure_ddp()
                note_summed(self.model)

        def without_sync(self) -> AbstractContextManager[Any]:
            """Context in which a backward pass does not sum gradients over the ranks."""
            model: Any = self.model
            return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

        def sums_now(self) -> bool:
            """Whether a backward pass sums gradients over the ranks now."""
            return not isinstance(self.model, DistributedDataParallel) or self.model.require_backward_grad_sync

        def use_new_groups(self) -> None:
            """Sum gradients in the new process group."""
            model: Any = self.model
            if isinstance(model, DistributedDataParallel):
                before = model.process_group.size()
                use_process_group(model, world_group())
                if before != self.world_size:
                    # What sums are divided by is settled when the buckets are made.
                    set_bucket_layout(model, bucket_layout(model))
            else:
                wrap_late(self)

    return CkptlessStrategy


@lru_cache(maxsize=len(DISTRIBUTIONS))
def model_parallel_class(distribution: str) -> type[Any]:
    """`CkptlessModelParallelStrategy` for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(distribution, "strategies").ModelParallelStrategy, distribution)

    class CkptlessModelParallelStrategy(base):  # type: ignore[misc]
        """Sharded models that survive the loss of any rank: FSDP2 (`fully_shard`), tensor parallelism, and both.

        What each rank holds of a sharded tensor is mirrored once, by a rank that holds it, into host memory of peers in
        other failure domains. `configure_model()` of the model shards it, over `self.device_mesh`.
        """

        strategy_name = "ckptless_model_parallel"
        replicates = False

        def place_among_streams(self) -> tuple[int, int, int]:
            """This rank's number along the data-parallel dimension, the size of that, and ranks per number."""
            _, width = sizes_of(self)
            return self.global_rank // width, self.world_size // width, width

        def asked_streams(self) -> int:
            """Size of the data-parallel dimension when all ranks are there."""
            return int(self.num_nodes * self.num_processes // sizes_of(self)[1])

        def mesh_sizes(self) -> tuple[int, int] | None:
            """Ranks in each dimension of the mesh."""
            return sizes_of(self)

        def check_options(self) -> None:
            """Compare the mesh with the world, and the precision with what is supported.

            Raises:
                OptionsError: they do not fit.
            """
            if has_mesh(self):
                # That of an earlier fit, which may have lost nodes since.
                return
            sizes, ranks = sizes_of(self), self.num_nodes * self.num_processes
            if math.prod(sizes) != ranks:
                raise OptionsError(
                    f"data_parallel_size={sizes[0]} x tensor_parallel_size={sizes[1]} makes a mesh of "
                    f"{math.prod(sizes)} ranks, Trainer(num_nodes={self.num_nodes}, devices={self.num_processes}) has "
                    f"{ranks}: choose sizes whose product is {ranks}"
                )
            if (precision := precision_of(self)) not in PRECISIONS:
                raise OptionsError(
                    f"precision={precision!r} is not supported for sharded models: choose among {', '.join(PRECISIONS)}"
                )
            if self.options.checkpoint_hooks != "never":
                raise OptionsError(
                    f"checkpoint_hooks={self.options.checkpoint_hooks!r} would gather a sharded model with each "
                    "version: set checkpoint_hooks='never', and keep that state in plain attributes or state_dict()"
                )

        def setup_environment(self) -> None:
            """Set the process up as Lightning does, but make one mesh for all calls: those who meet again need it."""
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
            """Why the model, as it is, could not go on among another number of ranks."""
            model = self.lightning_module
            return obstacle_to_resharding(sharded_modules(model), model.parameters(), self.device_mesh)

        def use_new_groups(self) -> None:
            """Give the mesh, and the modules that are sharded over it, groups of the new generation.

            Where the world or this rank's place in it is another one, what this rank holds of each tensor becomes so.

            Raises:
                LayoutMismatchError: a tensor cannot be divided over the ranks that there are.
            """
            fit_mesh(self)
            number_groups_from(FIRST_GROUP_OF_MESH)
            with self.world.making(), one_by_one():
                anew = make_mesh(self)
            mesh, modules = self.device_mesh, sharded_modules(self.lightning_module)
            has_moved = become(mesh, anew)
            forget_iteration(modules)
            for parameter in self.lightning_module.parameters():
                parameter.grad = None
            if has_moved:
                resize_sharded_state(self.lightning_module.trainer, modules, mesh)

    return CkptlessModelParallelStrategy
