"""The files hidden beside a checkpoint file: a copy that was set aside, and files held back after their removal.

Copies are kept in the file's folder, without the suffix `.ckpt`: on the same file system a rename is enough, for a file
and for the folder of a sharded model alike.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lightning_ckptless.protocol.checkpoint_history import FileHistory, Found, Move
from lightning_ckptless.protocol.versions import Version

WRITTEN_LAST = (".metadata", "meta.pt")
"""Files written last into the folder of a sharded checkpoint, by torch.distributed.checkpoint and by Lightning."""
_LONGEST_NAME_BYTES = 200
"""File systems allow 255 bytes, and the names of the copies are longer than the file's."""


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of one path, made by one fit.

    Args:
        path: absolute path of the checkpoint.
        fit: fit index.
    """

    path: str
    fit: int

    @property
    def aside(self) -> str:
        """Path of the copy that was set aside."""
        return self._hidden(f"ckptless-aside-{self.fit}")

    def held(self, after: Version) -> str:
        """Path of the file that was removed after a version."""
        return self._hidden(f"ckptless-removed-{self.fit}-{after.optimizer_step}-{int(after.validation_done)}")

    def hold(self, after: Version) -> None:
        """Hold the file back instead of removing it.

        Raises:
            OSError: the file cannot be moved.
        """
        os.rename(self.path, self.held(after))

    def is_held(self, after: Version) -> bool:
        """Whether the file that was removed after a version is still held."""
        return os.path.lexists(self.held(after))

    def drop_held(self, after: Version) -> None:
        """Delete the file that was held back, so that its removal takes effect."""
        if self.is_held(after):
            delete(self.held(after))

    def found(self, held: Version | None = None) -> Found:
        """Determine which of the files exist.

        Args:
            held: the removal in question; None if no held file matters.
        """
        is_held = held is not None and self.is_held(held)
        return Found(os.path.lexists(self.path), aside=os.path.lexists(self.aside), held=is_held)

    def carry_out(self, moves: Iterable[Move], held: Version | None = None) -> None:
        """Carry out what `protocol.checkpoint_history` has decided.

        Args:
            moves: moves, in order.
            held: the removal whose held file is restored, if any.
        """
        for move in moves:
            match move:
                case Move.SET_ASIDE:
                    os.rename(self.path, self.aside)
                case Move.DELETE:
                    delete(self.path)
                case Move.DROP_ASIDE:
                    if os.path.lexists(self.path) and not is_whole(Path(self.path)):
                        # The rewrite was interrupted: only the copy can be loaded.
                        self._put_back(self.aside)
                    else:
                        delete(self.aside)
                case Move.PUT_ASIDE_BACK:
                    self._put_back(self.aside)
                case Move.PUT_HELD_BACK:
                    assert held is not None
                    self._put_back(self.held(held))

    def first_held(self, history: FileHistory, version: Version) -> Version | None:
        """Find the removal that a rollback to a version has to undo; all other held files are deleted.

        The first removal holds the file's content at the version. Whatever was written and removed after it is written
        and removed again by the replay.
        """
        removals = [after for after in history.removals(self.path) if self.is_held(after)]
        first = next((after for after in removals if after >= version), None)
        for after in removals:
            if after != first:
                self.drop_held(after)
        return first

    def _put_back(self, copy: str) -> None:
        if os.path.lexists(self.path):
            delete(self.path)
        os.rename(copy, self.path)

    def _hidden(self, suffix: str) -> str:
        folder, name = os.path.split(self.path)
        if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
            name = xxhash.xxh3_128_hexdigest(os.fsencode(name))
        return os.path.join(folder, f".{name}.{suffix}")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete: a file, or the folder of a sharded model with the files written last."""
    return path.is_file() or all((path / last).is_file() for last in WRITTEN_LAST)


def delete(path: str) -> None:
    """Delete a file, a link, or a folder with its contents."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
