"""The interface of Lightning's distributed strategies: what ours use of it, and the arguments that they pass on.

Our strategies are mixins that precede a class of Lightning in the order of bases. Type checkers see what that class
provides; at runtime the declarations are empty, so that `super()` reaches the class itself.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

if TYPE_CHECKING:

    class LightningStrategy:
        """What `DDPStrategy` and `ModelParallelStrategy` have in common."""

        model: Any
        num_nodes: int
        cluster_environment: Any
        checkpoint_io: Any
        _launcher: Any
        _timeout: timedelta | None

        def __init__(self, **arguments: Any) -> None: ...
        @property
        def num_processes(self) -> int: ...
        @property
        def global_rank(self) -> int: ...
        @property
        def world_size(self) -> int: ...
        @property
        def is_global_zero(self) -> bool: ...
        @property
        def root_device(self) -> torch.device: ...
        @property
        def lightning_module(self) -> Any: ...
        def _get_process_group_backend(self) -> str: ...
        def set_world_ranks(self) -> None: ...
        def setup_environment(self) -> None: ...
        def setup(self, trainer: Any) -> None: ...
        def on_train_start(self) -> None: ...
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...
        def training_step(self, *args: Any, **kwargs: Any) -> Any: ...
        def validation_step(self, *args: Any, **kwargs: Any) -> Any: ...
        def pre_backward(self, closure_loss: Any) -> None: ...
        def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any: ...
        def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any: ...
        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None: ...
        def remove_checkpoint(self, filepath: Any) -> None: ...
        def barrier(self, name: str | None = None) -> None: ...
        def broadcast(self, obj: Any, src: int = 0) -> Any: ...
        def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any: ...
        def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any: ...
        def __getstate__(self) -> dict[str, Any]: ...
        def __setstate__(self, state: dict[str, Any]) -> None: ...

    class LightningDataParallel(LightningStrategy):
        """What only `DDPStrategy` has."""

        def setup_distributed(self) -> None: ...
        def configure_ddp(self) -> None: ...

    class LightningModelParallel(LightningStrategy):
        """What only `ModelParallelStrategy` has."""

        @property
        def device_mesh(self) -> Any: ...
        def _setup_distributed(self) -> None: ...

else:
    LightningStrategy = LightningDataParallel = LightningModelParallel = object


class DataParallelArguments(TypedDict, total=False):
    """The arguments of `DDPStrategy`, including those for torch's `DistributedDataParallel`.

    `Any` stands for classes that differ between the distributions of Lightning, and for private ones of torch.
    """

    accelerator: Any
    parallel_devices: list[torch.device] | None
    cluster_environment: Any
    checkpoint_io: Any
    precision_plugin: Any
    ddp_comm_state: object | None
    ddp_comm_hook: Callable[..., Any] | None
    ddp_comm_wrapper: Callable[..., Any] | None
    model_averaging_period: int | None
    process_group_backend: str | None
    timeout: timedelta | None
    start_method: Literal["popen", "fork"]
    output_device: int | torch.device | None
    dim: int
    broadcast_buffers: bool | None
    init_sync: bool
    process_group: Any
    bucket_cap_mb: float | None
    find_unused_parameters: bool
    check_reduction: bool
    gradient_as_bucket_view: bool
    static_graph: bool
    delay_all_reduce_named_params: list[tuple[str, torch.nn.Parameter]] | None
    param_to_hook_all_reduce: torch.nn.Parameter | None
    mixed_precision: Any
    device_mesh: Any
    skip_all_reduce_unused_params: bool
    bucket_cap_mb_list: list[int] | None
    batched_grad_copy: bool
    forward_sync_buffers: bool | None
    lazy_bucket_allocation: bool
