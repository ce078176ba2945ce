"""The folders that a program has chosen for its run: a process that comes later gets those of the first one.

A program that names its folders by the time of its start names other ones in every process. What the first process of
a rank had chosen is noted in the arena, and given to a process that takes its place before its trainer sets anything
up. Folders that callbacks derive from a logger follow from the logger's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lightning_ckptless.internals.lightning.process import set_root_folder
from lightning_ckptless.membership.worker.hydra import folder_of_run, folder_of_sweep
from lightning_ckptless.trainer.reporting.checkpoint_files import absolute

Facts = dict[str, Any]

_chosen_before: dict[str, str] = {}
"""Folders that this process had chosen, and those of the run in their place: for fits that have noted none yet."""


class RunFolders:
    """Those of one trainer, on one rank.

    Args:
        trainer: in `fit`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def facts(self) -> Facts:
        """Where this process is and writes, as the note has it."""
        return {
            "cwd": os.getcwd(),
            "root": absolute(str(self._trainer.default_root_dir)),
            "dirpaths": [[type(owner).__name__, _dirpath(owner)] for owner in self._owners()],
        }

    def adopt(self, noted: list[Facts] | None, rank: int) -> None:
        """Use the folders of the run; called before the trainer sets anything up.

        Args:
            noted: facts of all ranks; None where this fit has noted none.
            rank: whose place this process takes.
        """
        if noted is not None and rank < len(noted):
            facts = noted[rank]
            own = self.facts()
            _chosen_before.update(_differing(own, facts))
            if facts["cwd"] != own["cwd"] and os.path.isdir(facts["cwd"]):
                os.chdir(facts["cwd"])
        if not _chosen_before:
            return
        own_root = absolute(str(self._trainer.default_root_dir))
        if (root := _in_place_of(own_root)) != own_root:
            set_root_folder(self._trainer, root)
        for owner in self._owners():
            if (own_path := _dirpath(owner)) is not None and (path := _in_place_of(own_path)) != own_path:
                owner.dirpath = Path(path) if isinstance(owner.dirpath, Path) else path

    def _owners(self) -> list[Any]:
        """Callbacks and the profiler; those that inject faults or write traces are no part of the run."""
        ours = "lightning_ckptless"
        callbacks = [c for c in self._trainer.callbacks if not type(c).__module__.startswith(ours)]
        return [*callbacks, self._trainer.profiler]


def hydra_folder() -> str:
    """The folder of the run or of the sweep that Hydra has made for this process; empty without Hydra."""
    loaded = sys.modules.get("hydra.core.hydra_config")
    if loaded is None or not loaded.HydraConfig.initialized():
        return ""
    config = loaded.HydraConfig.get()
    if config.mode is not None and config.mode.name == "MULTIRUN":
        return folder_of_sweep(os.path.join(config.runtime.cwd, config.sweep.dir))
    return folder_of_run(config.runtime.output_dir)


def _dirpath(owner: Any) -> str | None:
    # Of the instance alone: what a class computes for any name that it is asked for is no folder.
    path = getattr(owner, "__dict__", {}).get("dirpath")
    return absolute(str(path)) if isinstance(path, str | os.PathLike) else None


def _differing(own: Facts, noted: Facts) -> dict[str, str]:
    pairs = [(own["cwd"], noted["cwd"]), (own["root"], noted["root"])]
    if [name for name, _ in own["dirpaths"]] == [name for name, _ in noted["dirpaths"]]:
        pairs += [
            (mine, theirs)
            for (_, mine), (_, theirs) in zip(own["dirpaths"], noted["dirpaths"], strict=True)
            if mine is not None and theirs is not None
        ]
    return {mine: theirs for mine, theirs in pairs if mine != theirs}


def _in_place_of(path: str) -> str:
    """The folder of the run in the place of one that this process has chosen, or of a folder above it."""
    above = [path, *map(str, Path(path).parents)]
    for folder in above:
        if folder in _chosen_before:
            return _chosen_before[folder] + path.removeprefix(folder)
    return path
