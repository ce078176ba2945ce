"""Which distribution of Lightning a program uses: the one that its workers shall find imported, and only that one.

A worker that finds both imported cannot tell which one a class of ours is wanted for, and importing the one that was
not preloaded takes seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_ckptless import environment

LIGHTNING = "lightning.pytorch"
PYTORCH_LIGHTNING = "pytorch_lightning"

_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+lightning\b", re.MULTILINE)
_PYTORCH_LIGHTNING = re.compile(rb"^\s*(?:import|from)\s+pytorch_lightning\b", re.MULTILINE)


def distribution_of(words: Iterable[str], env: Mapping[str, str] = os.environ) -> str:
    """The distribution that a command line's script imports, read off its text; `lightning.pytorch` in doubt.

    Args:
        words: the command line; what is a python file in it is looked into.
        env: may name the distribution (`CKPTLESS_LIGHTNING`).
    """
    if named := env.get(environment.LIGHTNING):
        return named
    for word in words:
        if word.endswith(".py") and Path(word).is_file():
            text = Path(word).read_bytes()
            return PYTORCH_LIGHTNING if _PYTORCH_LIGHTNING.search(text) and not _LIGHTNING.search(text) else LIGHTNING
    return LIGHTNING
