"""The dictionary of a checkpoint file, as Lightning puts it together.

Apart from `recipe`, which describes a checkpoint without calling the program's hooks.
"""

from __future__ import annotations

from typing import Any


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """What `trainer.save_checkpoint` would write now. The hooks of the program run; all ranks call it together."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def average_of(callback: Any) -> Any:
    """The averaged model that a `WeightAveraging` callback holds; None before it has made one."""
    return vars(callback).get("_average_model")


def hparams_name(owner: Any) -> str | None:
    """The name of the argument that a module or datamodule took its hyper-parameters from; None where it took none."""
    return getattr(owner, "_hparams_name", None)
