"""`python train.py` turned into an agent, which runs the same command line in workers."""

from __future__ import annotations

import builtins
import multiprocessing.process
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.launch.command_line import CommandLine, parse_command_line

AGENT_MODULE = "lightning_ckptless.membership"


def replace_by_agent(
    *,
    nproc: int,
    nnodes: int | str = 1,
    run_root: str | Path,
    arena_dir: str | Path | None = None,
    rdzv_endpoint: str | None = None,
    run_id: str | None = None,
    preload: Sequence[str] = (),
    agent_module: str = AGENT_MODULE,
) -> NoReturn:
    """Replace this process by an agent that runs its command line once per rank.

    Keeps the process id, the environment, the options of the interpreter and the folder it was started in. Nothing
    after the call runs: the agent ends with the workers' exit code.

    Args:
        nproc: workers on this node.
        nnodes: number of nodes, or `min:max`.
        run_root: folder that receives the run's folder.
        arena_dir: folder of the shared memory; None for the default.
        rdzv_endpoint: `host:port` where several nodes meet.
        run_id: name of the run; None to have one made up.
        preload: modules to import before forking, beyond the default ones.
        agent_module: what is run with `-m` as the agent; it gets options of `ckptless run`.

    Raises:
        LaunchError: the program cannot be started again, because it is not a file or a module.
    """
    line = parse_command_line(sys.orig_argv)
    folder = Path(multiprocessing.process.ORIGINAL_DIR or os.getcwd())  # type: ignore[attr-defined]
    refusal = why_not_again(line, folder)
    if refusal is not None:
        raise LaunchError(refusal)
    options = {
        "--nproc-per-node": nproc,
        "--nnodes": nnodes,
        "--run-root": Path(run_root).absolute(),
        "--arena-dir": None if arena_dir is None else Path(arena_dir).absolute(),
        "--rdzv-endpoint": rdzv_endpoint,
        "--rdzv-id": run_id,
    }
    command = agent_command(line, options, preload, agent_module)
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, *command])


def agent_command(
    line: CommandLine, options: Mapping[str, object], preload: Sequence[str], agent_module: str = AGENT_MODULE
) -> list[str]:
    """What follows the interpreter on the agent's command line.

    Args:
        line: how this process was started.
        options: of `ckptless run`, with their values; those that are None are left out.
        preload: values of `--preload`.
        agent_module: what is run with `-m`.
    """
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    given += [f"--preload={module}" for module in preload]
    if line.source == "module":
        given.append("-m")
    return [*line.flags, "-m", agent_module, *given, "--", line.target, *line.args]


def why_not_again(line: CommandLine, folder: Path) -> str | None:
    """Why a program cannot be started once more; None when it can.

    Args:
        line: how it was started.
        folder: the folder in which it was started.
    """
    remedy = "put the training into a file and run: python FILE.py"
    if line.source in ("command", "stdin"):
        remedy += ', or choose strategy="ckptless_notebook", whose workers are forks of this process'
    if line.source == "command":
        return f"the workers run the same program again, and this one was given with -c; {remedy}"
    if line.source == "stdin":
        return f"the workers run the same program again, and this one came from standard input; {remedy}"
    if line.source == "script" and not (folder / line.target).exists():
        return f"the workers run {line.target!r} again, but it is no longer there, seen from {folder}; {remedy}"
    return None


def is_interactive() -> bool:
    """Whether this process is a notebook or a prompt: what was typed there cannot be run again from a file."""
    return hasattr(sys, "ps1") or hasattr(builtins, "get_ipython") or bool(sys.flags.interactive)
