"""Private parts of Lightning's checkpoints.

Separate from `recipe`, which describes a checkpoint without calling the script's hooks.
"""

from __future__ import annotations

from typing import Any


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """Build what `trainer.save_checkpoint` would write now. Runs the script's hooks; all ranks must call it."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def average_of(callback: Any) -> Any:
    """Return the averaged model of a `WeightAveraging` callback; None before it has created one."""
    return vars(callback).get("_average_model")


def hparams_name(owner: Any) -> str | None:
    """Return the name of the argument with the hyper-parameters of a module or datamodule; None if there is none."""
    return getattr(owner, "_hparams_name", None)
