"""Turns `python train.py` into an agent that runs the same command line in its workers."""

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

    Process id, environment, interpreter options and working directory are kept. Nothing after the call runs: the agent
    exits with the workers' exit code.

    Args:
        nproc: workers on this node.
        nnodes: number of nodes, or `min:max`.
        run_root: parent folder of the run folder.
        arena_dir: folder of the arenas; None for the default.
        rdzv_endpoint: `host:port` where several nodes rendezvous.
        run_id: name of the run; None to generate one.
        preload: modules to import before forking, in addition to the default ones.
        agent_module: run with `-m` as the agent; takes the options of `ckptless run`.

    Raises:
        LaunchError: the script cannot be restarted, because it is neither a file nor a module.
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
    """Return the agent's command line, without the interpreter.

    Args:
        line: how this process was started.
        options: options of `ckptless run`, with their values; None values are left out.
        preload: values of `--preload`.
        agent_module: run with `-m`.
    """
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    given += [f"--preload={module}" for module in preload]
    if line.source == "module":
        given.append("-m")
    return [*line.flags, "-m", agent_module, *given, "--", line.target, *line.args]


def why_not_again(line: CommandLine, folder: Path) -> str | None:
    """Explain why a script cannot be restarted; None if it can.

    Args:
        line: how it was started.
        folder: folder in which it was started.
    """
    remedy = "move the training into a file and run: python FILE.py"
    if line.source in ("command", "stdin"):
        remedy += ', or use strategy="ckptless_notebook", whose workers are forks of this process'
    if line.source == "command":
        return f"each worker runs the same script again, but this one was passed with -c; {remedy}"
    if line.source == "stdin":
        return f"each worker runs the same script again, but this one was read from standard input; {remedy}"
    if line.source == "script" and not (folder / line.target).exists():
        return f"each worker runs {line.target!r} again, but it does not exist in {folder}; {remedy}"
    return None


def is_interactive() -> bool:
    """Whether this process is a notebook or a prompt, whose input cannot be run again from a file."""
    return hasattr(sys, "ps1") or hasattr(builtins, "get_ipython") or bool(sys.flags.interactive)
