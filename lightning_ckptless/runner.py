"""One run on this node: its agent, the ledger that the agent writes to, and the arenas that are removed with it.

`membership` starts workers and knows nothing of arenas, `replica` manages arenas and knows nothing of agents; this
module connects the two. It is the main module of the process that `ckptless run` and `python train.py` turn into.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ckptless import environment
from lightning_ckptless.errors import SIGTERM_EXIT_CODE
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import main as run_agent
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.protocol.run_end import RunOutcome, conclude

if TYPE_CHECKING:
    from lightning_ckptless.replica.arena import Arena


def run_job(config: LaunchConfig, *, parent: ForkServer | None = None) -> Outcome:
    """Run a script on this node with the agent in the calling process, and remove its arenas at the end.

    Args:
        config: what to run.
        parent: a fork server that outlives the run; None to start one for this run.

    Raises:
        LaunchError: the workers cannot be started, or the rendezvous failed.
    """
    config = replace(config, run_root=config.run_root or environment.run_root())
    try:
        return run(config, parent=parent, record=record_for(config))
    finally:
        settle_checkpoint_files(config)
        remove_arenas(config)


def main(argv: Sequence[str]) -> int:
    """Run an agent in this process.

    Args:
        argv: options of `ckptless run`, the script and its arguments.

    Returns:
        Exit code.
    """

    def ended(config: LaunchConfig, outcome: Outcome | None) -> str:
        settle_checkpoint_files(config)
        run_id = [] if config.is_named else [f"--rdzv-id={config.run_id}"]
        conclusion = conclude(
            RunOutcome(
                is_asked_for=outcome is None or outcome.exit_code == SIGTERM_EXIT_CODE,
                has_given_up=outcome is not None and outcome.has_given_up,
                is_named=config.is_named,
                committed=_committed(config),
                durable=_durable(config),
                was_in_agent=any(arena.links_to_memory for arena in _arenas(config)),
                command=shlex.join(["ckptless", "run", *run_id, *argv]),
            )
        )
        if not conclusion.keeps_arenas:
            remove_arenas(config)
        return conclusion.text

    return run_agent(argv, record_for=record_for, ended=ended)


def record_for(config: LaunchConfig) -> Callable[..., None]:
    """Return a function that records the agent's events in the ledger of a run."""
    from lightning_ckptless.ledger import Ledger  # noqa: PLC0415 - not before the fork server's own imports

    return Ledger(_ledger_path(config)).record


def _ledger_path(config: LaunchConfig) -> Path:
    from lightning_ckptless.ledger import LEDGER_NAME, run_folder  # noqa: PLC0415 - as above

    return run_folder(config.run_root or environment.run_root(), config.run_id) / LEDGER_NAME


def settle_checkpoint_files(config: LaunchConfig) -> None:
    """Restore checkpoint files that a replay had set aside when the run ended; its workers have exited."""
    from lightning_ckptless.trainer.outputs.checkpoint_files import settle_run  # noqa: PLC0415 - as above

    if config.node_range[1] == 1:
        # With several nodes, other nodes may still be training.
        settle_run(_ledger_path(config))


def remove_arenas(config: LaunchConfig) -> None:
    """Remove the arenas that this agent's workers have created for a run."""
    for arena in _arenas(config):
        arena.remove()


def _arenas(config: LaunchConfig) -> list[Arena]:
    """The arenas that this agent's workers have created for a run, in the order of its calls of `fit`."""
    from lightning_ckptless.ledger import read_ledger  # noqa: PLC0415 - as above
    from lightning_ckptless.replica.arena import Arena, default_arena_dir, find_arenas  # noqa: PLC0415 - imports torch

    # The strategy may have set another folder, which is recorded in the ledger.
    started = read_ledger(_ledger_path(config), only="run_started")
    named = {Path(event.fields["arena"]).parent for event in started}
    infos = [info for folder in {config.arena_dir or default_arena_dir(), *named} for info in find_arenas(folder)]
    found = [
        info
        for info in infos
        if info.owner.pid == os.getpid()
        and (info.run_id == config.run_id or info.run_id.startswith(f"{config.run_id}."))
    ]
    return [Arena.attach(info.path) for info in sorted(found, key=lambda info: info.created_at)]


def _committed(config: LaunchConfig) -> str:
    """The newest version in this node's shared memory, as text; empty if there is none."""
    from lightning_ckptless.protocol.versions import Complete, newest_complete  # noqa: PLC0415 - as above

    for arena in reversed(_arenas(config)):
        found = newest_complete(arena.inventory())
        if isinstance(found, Complete):
            return f"{found.snapshot.version} of the run"
        if found.since is not None:
            return f"this node's part of {found.since} of the run"
    return ""


def _durable(config: LaunchConfig) -> str:
    """The newest durable state of a run, as text; empty if there is none."""
    from lightning_ckptless.ledger import read_ledger  # noqa: PLC0415 - as above

    written = [event.fields["step"] for event in read_ledger(_ledger_path(config), only="durable_written")]
    return f"the durable state of step {written[-1]}" if written else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
