"""A micro-batch with all that its gradients depend on besides the weights, so that another rank can run it again.

| Part | Why |
|---|---|
| the batch | each rank has its own |
| the random numbers of the process | dropout, augmentation in `training_step` |
| attributes, generators, modes and extra state of the model, and objects that it holds | a counter in a layer |
| buffers | each rank has its own, such as the running mean of a norm |

A rank runs its own micro-batch from such a message too, never from the live batch, which a step may change. The step is
that of the script, without the wrapper that reduces gradients, and its gradients never reach `grad`. Each run begins
from the same state, and afterwards everything is as it was: what is listed above, weights, metrics, and logs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.virtual_ranks import logs_kept, training_loss
from lightning_ckptless.internals.torch_internals import AroundOperators, parameter_dicts
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng

ALGORITHM = "xxh3"
_OF_OTHER_RANKS = ("c10d.", "_c10d_functional.")
_CANNOT_BE_PACKED = (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError)


class MicroBatches:
    """Packs the micro-batch of this rank, and runs those of any rank.

    Args:
        trainer: in `fit`.
        host_state: returns the host state of the trainer.
        silenced: makes a context in which rows for the loggers are dropped.
    """

    def __init__(
        self, trainer: Any, host_state: Callable[[], HostState], silenced: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._trainer = trainer
        self._host_state = host_state
        self._silenced = silenced

    def pack(self, batch: Any) -> Packed:
        """Pack the micro-batch that is about to be trained on.

        Args:
            batch: the batch, on the device.

        Raises:
            OptionsError: it cannot be handed to another rank.
        """
        buffers = [parameter_dicts(each)[1] for each in self._trainer.lightning_module.modules()]
        around = {"held": self._host_state().of_step(), "buffers": buffers, "rng": capture_rng()}
        try:
            return pack({"batch": batch, **around})
        except _CANNOT_BE_PACKED as error:
            raise OptionsError(
                f"rank {self._trainer.global_rank}: replay_check_every: this batch cannot be handed to another rank: "
                f"{error}. Use batches of tensors, arrays and plain data, or leave out the option"
            ) from error

    @contextmanager
    def runs(self, packed: Packed) -> Iterator[Callable[[Packed], dict[str, str]]]:
        """Context with a function that runs a micro-batch of any rank, and returns a digest of each gradient.

        Args:
            packed: the micro-batch of this rank; afterwards the trainer is as it was when it was packed.

        Raises:
            OptionsError: the training step does something that it cannot do on one rank.
        """
        before = _Before(self._trainer.lightning_module)

        def run(other: Packed) -> dict[str, str]:
            before.put_back()
            return self._run(unpack(other))

        with logs_kept(self._trainer), self._silenced():
            try:
                yield run
            finally:
                # Also if a peer is lost: this rank then restores a version, but not the weights that it has already.
                before.put_back()
                self._put_in_place(unpack(packed))

    def _run(self, found: dict[str, Any]) -> dict[str, str]:
        self._put_in_place(found)
        trainer = self._trainer
        with trainer.strategy.replaying(), AroundOperators(self._by_itself), torch.enable_grad():
            loss = training_loss(trainer, found["batch"])
            if loss is None:
                return {}
            trained = {name: each for name, each in trainer.lightning_module.named_parameters() if each.requires_grad}
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found_by_name = {"loss": loss, **dict(zip(trained, gradients, strict=True))}
        return {name: _digest(gradient) for name, gradient in found_by_name.items() if gradient is not None}

    def _put_in_place(self, found: dict[str, Any]) -> None:
        self._host_state().put_back(found["held"])
        with torch.no_grad():
            for module, saved in zip(self._trainer.lightning_module.modules(), found["buffers"], strict=True):
                for name, value in saved.items():
                    _set_buffer(parameter_dicts(module)[1], name, value)
        apply_rng(found["rng"])

    def _by_itself(self, operator: str, call: Callable[[], Any]) -> Any:
        if operator.startswith(_OF_OTHER_RANKS):
            raise OptionsError(
                f"rank {self._trainer.global_rank}: replay_check_every: training_step exchanges data with other ranks "
                f"({operator}), so that no rank can run it again by itself: leave out the option"
            )
        return call()


class _Before:
    """A model as it is now: its tensors, and what its attributes refer to.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        kept: list[Any] = [each for module in modules for each in (vars(module), *parameter_dicts(module))]
        kept += [each for module in modules for each in vars(module).values() if type(each) in (dict, list)]
        self._containers = [(each, copy(each)) for each in kept]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Restore it; objects that others may refer to are kept."""
        for container, contents in self._containers:
            if isinstance(container, dict):
                for added in container.keys() - contents.keys():
                    del container[added]
                container.update(contents)
            else:
                container[:] = contents
        for tensor, data, value in self._tensors:
            # Also if the script has replaced it.
            tensor.data = data
            if not torch.equal(data, value):
                data.copy_(value)


def _set_buffer(buffers: dict[str, Tensor | None], name: str, value: Tensor | None) -> None:
    live = buffers.get(name)
    if live is None or value is None or live.shape != value.shape or live.dtype is not value.dtype:
        buffers[name] = value
    elif not torch.equal(live, value):
        live.copy_(value)


def _digest(tensor: Tensor) -> str:
    if tensor.is_sparse:
        found = tensor.coalesce()
        return _digest(found.indices()) + _digest(found.values())
    host = tensor.detach().cpu().contiguous().reshape(-1)
    return digest(ALGORITHM, [bytes_of(host.view(torch.uint8))])
