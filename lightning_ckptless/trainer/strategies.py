"""The strategies that users name."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.communicators import world_group
from lightning_ckptless.torch_internals import use_process_group
from lightning_ckptless.trainer.host.ddp import wrap_late
from lightning_ckptless.trainer.host.flavour import FLAVOURS, module
from lightning_ckptless.trainer.host.model_parallel import PRECISIONS, precision_of, sizes_of
from lightning_ckptless.trainer.host.process import set_up_device
from lightning_ckptless.trainer.recoverable import recoverable


def strategy_class(flavour: str, name: str = "ckptless") -> type[Any]:
    """A strategy for one distribution of Lightning.

    Args:
        flavour: `lightning.pytorch` or `pytorch_lightning`.
        name: `ckptless` or `ckptless_model_parallel`.
    """
    made = {"ckptless": data_parallel_class, "ckptless_model_parallel": model_parallel_class}[name](flavour)
    made.__module__, made.__qualname__ = "lightning_ckptless", made.__name__
    return made


@lru_cache(maxsize=len(FLAVOURS))
def data_parallel_class(flavour: str) -> type[Any]:
    """`CkptlessStrategy` for one distribution of Lightning.

    Args:
        flavour: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(flavour, "strategies").DDPStrategy, flavour)

    class CkptlessStrategy(base):  # type: ignore[misc]
        """Data parallelism that survives the loss of any rank.

        After every optimizer step the state of training is mirrored, in shards, into host memory of peers in other
        failure domains. When a worker dies, a new process takes its place and the others go back to the last step;
        where that is not possible all are started again. Training goes on from what the arenas hold, bit for bit.
        """

        strategy_name = "ckptless"

        def setup_distributed(self) -> None:
            """Join the current generation, then let Lightning do the rest of its set-up."""
            if self.join_generation():
                super().setup_distributed()

        def configure_ddp(self) -> None:
            """Wrap the model, once there is a process group to sum its gradients in."""
            if self.world.is_open:
                super().configure_ddp()

        def use_new_groups(self) -> None:
            """Sum gradients in the new process group."""
            if isinstance(self.model, DistributedDataParallel):
                use_process_group(self.model, world_group())
            else:
                wrap_late(self)

    return CkptlessStrategy


@lru_cache(maxsize=len(FLAVOURS))
def model_parallel_class(flavour: str) -> type[Any]:
    """`CkptlessModelParallelStrategy` for one distribution of Lightning.

    Args:
        flavour: `lightning.pytorch` or `pytorch_lightning`.
    """
    base: Any = recoverable(module(flavour, "strategies").ModelParallelStrategy, flavour)

    class CkptlessModelParallelStrategy(base):  # type: ignore[misc]
        """Sharded models that survive the loss of any rank: FSDP2 (`fully_shard`), tensor parallelism, and both.

        What each rank holds of a sharded tensor is mirrored once, by a rank that holds it, into host memory of peers in
        other failure domains. `configure_model()` of the model shards it, over `self.device_mesh`.
        """

        strategy_name = "ckptless_model_parallel"
        replicates = False

        def check_options(self) -> None:
            """Compare the mesh with the world, and the precision with what is supported.

            Raises:
                OptionsError: they do not fit.
            """
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

        def obstacle_in_place(self) -> str | None:
            """Why a lost rank is not replaced while the others go on."""
            return "a sharded model holds the process groups of its mesh"

        def setup_environment(self) -> None:
            """Set the process up as Lightning does, once there is a model to give its mesh to."""
            if self.lightning_module is None:
                set_up_device(self)
                self.join_generation()
            else:
                super().setup_environment()
                self.world.adopt_groups()

        def _setup_distributed(self) -> None:
            if self.join_generation():
                super()._setup_distributed()

    return CkptlessModelParallelStrategy
