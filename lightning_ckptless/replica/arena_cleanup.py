"""Finds and removes arenas whose agents have exited."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from lightning_ckptless.replica import arena_metadata
from lightning_ckptless.replica.arena import find_arenas
from lightning_ckptless.replica.arena_space import taken_bytes
from lightning_ckptless.replica.slot import SlotName

AbandonedArena = tuple[Path, int]


def find_abandoned_arenas(folder: Path, run_id: str | None) -> tuple[list[AbandonedArena], list[Path]]:
    """Return the arenas without a live agent, with their sizes in bytes, and the arenas with one.

    Args:
        folder: folder of all arenas.
        run_id: run whose arenas are returned; None for all runs, including arenas in another format, whose run id
            cannot be read.
    """
    mine = [i for i in find_arenas(folder) if run_id in (None, i.run_id) or i.run_id.startswith(f"{run_id}.")]
    abandoned = [(info.path, info.bytes) for info in mine if not info.owner_alive]
    alive = [info.path for info in mine if info.owner_alive]
    if run_id is None:
        readable = {info.path for info in find_arenas(folder)}
        unreadable = [path for path in _arena_folders(folder) if path not in readable]
        alive += [path for path in unreadable if _owner_lives(path)]
        abandoned += [(path, _size(path)) for path in unreadable if path not in alive]
    return abandoned, alive


def remove_abandoned_arena(path: Path) -> bool:
    """Remove an arena unless an agent has adopted it in the meantime; returns whether it is removed."""
    try:
        with arena_metadata.locked(path, wait=False) as held:
            if not held or _owner_lives(path):
                return False
            shutil.rmtree(path, ignore_errors=True)
    except FileNotFoundError:
        return True
    return True


def _arena_folders(folder: Path) -> list[Path]:
    """Return this user's arena folders, whatever their format and however damaged."""
    found = []
    for path in folder.glob(f"{arena_metadata.FOLDER_PREFIX}*"):
        # A run may remove its own arena at any time.
        with suppress(FileNotFoundError):
            facts = path.lstat()
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and _holds_state(path):
                found.append(path)
    return found


def _holds_state(path: Path) -> bool:
    return arena_metadata.exists(path) or any(SlotName.parse(file.name) is not None for file in path.iterdir())


def _owner_lives(path: Path) -> bool:
    return arena_metadata.living_owner(path) is not None


def _size(path: Path) -> int:
    # `os.walk` skips files that are removed in the meantime.
    return sum(taken_bytes(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)
