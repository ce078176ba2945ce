"""The user's `on_save_checkpoint` hooks: called for each version if the user asks for it, otherwise never.

Lightning calls these hooks when it writes a checkpoint file, and scripts rely on that: hooks count calls, delete
entries, write files. A version is not a checkpoint file. State in plain attributes, `state_dict` or extra state needs
no hook. For state that only these hooks save, `checkpoint_hooks="every_version"` captures the dictionary that
Lightning would write, hooks included. Large tensors in it are already part of the version and are stored by name.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from lightning_ckptless.distributions import DISTRIBUTIONS
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import SmallTensorPickler, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.checkpoint import dump_checkpoint
from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.replica.layout.tensor_spec import local_part
from lightning_ckptless.trainer.state.plain_values import is_plain
from lightning_ckptless.trainer.state.rng import owned_generators

log = logging.getLogger(__name__)

SAVE, LOAD = "on_save_checkpoint", "on_load_checkpoint"


class CheckpointHooks:
    """The checkpoint hooks of one trainer.

    Args:
        trainer: in `fit`, with its model attached.
        callbacks: the callbacks that are part of the run.
        every_version: whether the hooks are called for each version.
    """

    def __init__(self, trainer: Any, callbacks: Iterable[Any], *, every_version: bool) -> None:
        self._trainer = trainer
        # Lightning's order: the model loads before the callbacks.
        owners = (trainer.lightning_module, *callbacks)
        self._savers = [owner for owner in owners if _own_hook(owner, SAVE) is not None]
        self._loaders = [owner for owner in owners if _own_hook(owner, LOAD) is not None]
        self._every_version = every_version and bool(self._savers)

    def warn_of_uncovered(self) -> None:
        """Warn, once per run, about objects that only a hook saves and that are not part of any version."""
        if self._every_version or not self._trainer.is_global_zero:
            return
        for owner in self._savers:
            kind = type(owner).__name__
            for name, value in _uncovered(owner):
                log.warning(
                    "ckptless: %s.%s saves self.%s (%s), which is not part of the mirrored state: a replacement "
                    "process starts with the value that the script creates. Keep it in plain attributes or in "
                    "state_dict(), or set checkpoint_hooks='every_version'",
                    kind, SAVE, name, type(value).__name__,
                )  # fmt: skip

    def capture(self, tensors: Mapping[str, Tensor]) -> Packed | None:
        """Return the current checkpoint dictionary, hooks included; None unless the user asked for it.

        Args:
            tensors: the tensors that are part of the version anyway, by name.

        Raises:
            OptionsError: a hook added something that cannot be pickled.
        """
        if not self._every_version:
            return None
        out = io.BytesIO()
        try:
            _ReferringPickler(out, tensors).dump(dump_checkpoint(self._trainer))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise OptionsError(
                f"checkpoint_hooks='every_version': rank {self._trainer.global_rank} cannot pickle the checkpoint of "
                f"step {self._trainer.global_step}: {error}. Leave that object out of {SAVE}, or set "
                "checkpoint_hooks='never'"
            ) from error
        return Packed(out.getvalue())

    def apply(self, saved: Packed | None, tensors: Mapping[str, Tensor]) -> None:
        """Call the user's `on_load_checkpoint` hooks with the captured dictionary.

        Args:
            saved: the result of `capture`.
            tensors: the tensors of the version by name, already restored.
        """
        if saved is None:
            return
        checkpoint = unpack(saved, lambda name: tensors[name])
        for owner in self._loaders:
            if is_a(owner, "callbacks", "Callback"):
                owner.on_load_checkpoint(self._trainer, self._trainer.lightning_module, checkpoint)
            else:
                owner.on_load_checkpoint(checkpoint)


def _own_hook(owner: Any, name: str) -> Callable[..., Any] | None:
    """Return the hook of an object's class if user code defines it, else None."""
    hook: Any = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), None)
    module = getattr(hook, "__module__", None) or ""
    is_ours = module.split(".")[0] == "lightning_ckptless"
    return (
        None if is_ours or any(f"{module}.".startswith(f"{distribution}.") for distribution in DISTRIBUTIONS) else hook
    )


def _uncovered(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield attributes (name and value) that the owner's save hook uses and that are not part of any version."""
    hook = _own_hook(owner, SAVE)
    if not isinstance(hook, FunctionType):
        return
    generators = owned_generators(owner)
    for name in hook.__code__.co_names:
        value = vars(owner).get(name)
        if name not in generators and not (is_plain(value) or isinstance(value, nn.Module)) and not callable(value):
            yield name, value


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class _ReferringPickler(SmallTensorPickler):
    """Writes the names of known tensors instead of their values.

    Args:
        out: receives the pickle.
        tensors: the known tensors by name.
    """

    def __init__(self, out: io.BytesIO, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = {_place(local_part(tensor)): name for name, tensor in tensors.items() if tensor.numel()}

    def persistent_id(self, value: Any) -> str | None:
        return self._names.get(_place(value)) if isinstance(value, Tensor) else None
