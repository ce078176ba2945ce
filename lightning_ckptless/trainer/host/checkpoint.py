"""The dictionary of a checkpoint file, as Lightning puts it together.

Apart from `recipe`, which describes a checkpoint without calling the program's hooks.
"""

from __future__ import annotations

from typing import Any


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """What `trainer.save_checkpoint` would write now. The hooks of the program run; all ranks call it together."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint
