"""The run folder of a program that Hydra runs.

Hydra names its folder by the time at which a process starts, so every process of a run would have one of its own.
Lightning's own launcher hands the folder of the first process to its children, as overrides on their command lines; the
processes of an agent get it in the same way, those that come after a fault included.

The folder is learned from the first process of a node when it comes to its trainer. Where the script imports Hydra, the
others are started after that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.membership.worker.program import Program

FIRST_WAIT_S = 60.0
"""For the first process to come to its trainer; then the others are started with folders of their own."""

_IMPORT = re.compile(rb"^\s*(?:import|from)\s+hydra\b", re.MULTILINE)
_RUN, _SWEEP = "run", "sweep"


def folder_of_run(path: str) -> str:
    """The folder of a single run, as one variable has it."""
    return f"{_RUN}={path}"


def folder_of_sweep(path: str) -> str:
    """The folder of a sweep (`--multirun`), as one variable has it."""
    return f"{_SWEEP}={path}"


def imports_hydra(program: Program, cwd: Path) -> bool:
    """Whether a program's own file imports Hydra, read off its text.

    Args:
        program: a script or a module.
        cwd: where it is started.
    """
    if program.kind not in ("script", "module"):
        return False
    name = program.target if program.kind == "script" else program.target.replace(".", "/") + ".py"
    file = cwd / name
    return file.suffix == ".py" and file.is_file() and _IMPORT.search(file.read_bytes()) is not None


def with_folder(program: Program, env: Mapping[str, str]) -> Program:
    """The program, with the folder that its environment names on its command line."""
    folder = env.get(environment.HYDRA, "")
    if not folder or program.kind == "executable":
        return program
    return replace(program, args=(*program.args, *arguments_for(folder, int(env.get("LOCAL_RANK", "0")))))


def without_folder(env: Mapping[str, str]) -> dict[str, str]:
    """The environment as the program sees it: what the program starts in its turn may have folders of its own."""
    return {name: value for name, value in env.items() if name != environment.HYDRA}


def arguments_for(folder: str, local_rank: int) -> tuple[str, ...]:
    """Overrides that give a process the run folder.

    Args:
        folder: as `folder_of_run` or `folder_of_sweep` has it.
        local_rank: of the process; all but the first log into files of their own, named as Lightning's launcher does.
    """
    mode, path = folder.split("=", 1)
    quoted = path.replace('"', '\\"')
    arguments = [f'hydra.{mode}.dir="{quoted}"']
    if local_rank:
        arguments.append(f"hydra.job.name=train_ddp_process_{local_rank}")
    if local_rank or mode == _RUN:
        # The configuration was written by the first process. The first of a sweep writes it for each of its jobs.
        arguments.append("hydra.output_subdir=null")
    return tuple(arguments)
