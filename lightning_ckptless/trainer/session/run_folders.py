"""The folders that a script has chosen for its run: a replacement uses those of the process it replaces.

A script that names its folders after the time of its start chooses different ones in every process. The choice of each
rank's first process is recorded in the arena and applied to a replacement before its trainer sets anything up. Folders
that callbacks derive from a logger follow the logger's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ckptless.internals.lightning.process import set_root_folder
from lightning_ckptless.membership.worker.hydra import folder_of_run, folder_of_sweep
from lightning_ckptless.replica.arena_notes import RankFolders
from lightning_ckptless.trainer.outputs.checkpoint_files import absolute

_chosen_before: dict[str, str] = {}
"""Folders that this process had chosen -> folders of the run; for fits that have not recorded any yet."""


class RunFolders:
    """The folders of one trainer, on one rank.

    Args:
        trainer: trainer in `fit`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def own(self) -> RankFolders:
        """The working directory and output folders of this process."""
        return RankFolders(
            os.getcwd(),
            absolute(str(self._trainer.default_root_dir)),
            tuple((type(owner).__name__, _dirpath(owner)) for owner in self._owners()),
        )

    def adopt(self, noted: Sequence[RankFolders] | None, rank: int) -> None:
        """Use the folders of the run; called before the trainer sets anything up.

        Args:
            noted: folders of all ranks; None if this fit has not recorded any.
            rank: rank that this process has.
        """
        if noted is not None and rank < len(noted):
            first, own = noted[rank], self.own()
            _chosen_before.update(_differing(own, first))
            if first.cwd != own.cwd and os.path.isdir(first.cwd):
                os.chdir(first.cwd)
        if not _chosen_before:
            return
        own_root = absolute(str(self._trainer.default_root_dir))
        if (root := _in_place_of(own_root)) != own_root:
            set_root_folder(self._trainer, root)
        for owner in self._owners():
            if (own_path := _dirpath(owner)) is not None and (path := _in_place_of(own_path)) != own_path:
                owner.dirpath = Path(path) if isinstance(owner.dirpath, Path) else path

    def _owners(self) -> list[Any]:
        """Callbacks and the profiler, without this package's fault injectors and trace writers."""
        ours = "lightning_ckptless"
        callbacks = [c for c in self._trainer.callbacks if not type(c).__module__.startswith(ours)]
        return [*callbacks, self._trainer.profiler]


def hydra_folder() -> str:
    """The run or sweep folder that Hydra has created for this process; empty without Hydra."""
    loaded = sys.modules.get("hydra.core.hydra_config")
    if loaded is None or not loaded.HydraConfig.initialized():
        return ""
    config = loaded.HydraConfig.get()
    if config.mode is not None and config.mode.name == "MULTIRUN":
        return folder_of_sweep(os.path.join(config.runtime.cwd, config.sweep.dir))
    return folder_of_run(config.runtime.output_dir)


def _dirpath(owner: Any) -> str | None:
    # Instance attributes only: a class may compute a value for any name that it is asked for.
    path = getattr(owner, "__dict__", {}).get("dirpath")
    return absolute(str(path)) if isinstance(path, str | os.PathLike) else None


def _differing(own: RankFolders, noted: RankFolders) -> dict[str, str]:
    pairs = [(own.cwd, noted.cwd), (own.root, noted.root)]
    if [name for name, _ in own.dirpaths] == [name for name, _ in noted.dirpaths]:
        pairs += [
            (mine, theirs)
            for (_, mine), (_, theirs) in zip(own.dirpaths, noted.dirpaths, strict=True)
            if mine is not None and theirs is not None
        ]
    return {mine: theirs for mine, theirs in pairs if mine != theirs}


def _in_place_of(path: str) -> str:
    """The run's folder in place of one chosen by this process, or below such a folder."""
    above = [path, *map(str, Path(path).parents)]
    for folder in above:
        if folder in _chosen_before:
            return _chosen_before[folder] + path.removeprefix(folder)
    return path
