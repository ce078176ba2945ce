"""The run folder of a script that Hydra runs.

Hydra names its folder after the start time of a process, so every process of a run would get its own folder.
Lightning's launcher passes the folder of the first process to its children as overrides on their command lines. The
processes of an agent, including replacements after a fault, receive it in the same way.

The agent learns the folder from the first process of a node when it reaches its trainer. If the script imports Hydra,
the other processes are started only then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.membership.worker.program import Program

FIRST_WAIT_S = 60.0
"""Time for the first process to reach its trainer; after that the others are started with their own folders."""

_IMPORT = re.compile(rb"^\s*(?:import|from)\s+hydra\b", re.MULTILINE)
_RUN, _SWEEP = "run", "sweep"


def folder_of_run(path: str) -> str:
    """Encode the folder of a single run in one environment variable."""
    return f"{_RUN}={path}"


def folder_of_sweep(path: str) -> str:
    """Encode the folder of a sweep (`--multirun`) in one environment variable."""
    return f"{_SWEEP}={path}"


def imports_hydra(program: Program, cwd: Path) -> bool:
    """Whether the file of a script or module imports Hydra, according to its text.

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
    """Add the folder that the environment names to a program's command line."""
    folder = env.get(environment.HYDRA, "")
    if not folder or program.kind == "executable":
        return program
    return replace(program, args=(*program.args, *arguments_for(folder, int(env.get("LOCAL_RANK", "0")))))


def without_folder(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the script, whose child processes may have their own folders."""
    return {name: value for name, value in env.items() if name != environment.HYDRA}


def arguments_for(folder: str, local_rank: int) -> tuple[str, ...]:
    """Return the overrides that give a process the run folder.

    Args:
        folder: as encoded by `folder_of_run` or `folder_of_sweep`.
        local_rank: local rank of the process; all but the first log into separate files, named as Lightning's launcher
            names them.
    """
    mode, path = folder.split("=", 1)
    quoted = path.replace('"', '\\"')
    arguments = [f'hydra.{mode}.dir="{quoted}"']
    if local_rank:
        arguments.append(f"hydra.job.name=train_ddp_process_{local_rank}")
    if local_rank or mode == _RUN:
        # The first process has written the configuration; in a sweep it does so for each job.
        arguments.append("hydra.output_subdir=null")
    return tuple(arguments)
