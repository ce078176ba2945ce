"""Records the final weights of a program, with any strategy."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lightning_ckptless.testing.digest import digest_tensors


def record_weights(module: nn.Module) -> None:
    """Write a digest of parameters and buffers into the working directory, one file per rank."""
    digest = digest_tensors(dict(module.state_dict()))
    Path(f"weights-{os.environ.get('LOCAL_RANK', '0')}.txt").write_text(digest)


def read_weights(folder: Path) -> dict[str, str]:
    """Return the digests that `record_weights` wrote to a folder, by file name."""
    return {path.name: path.read_text() for path in sorted(folder.glob("weights-*.txt"))}
