"""What a worker tells its agent when it enters the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.console import CONSOLE
from lightning_ckptless.membership.forkserver.imported import count_imported, take_imported
from lightning_ckptless.membership.worker.watcher import Watcher
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.messages import EnteredLoop, ProgramImported
from lightning_ckptless.protocol.replacement_startup import Arrival, Imports
from lightning_ckptless.trainer.session.arenas import is_first_of_node, local_rank


def announce_entry(watcher: Watcher, options: CkptlessOptions, strategy: Any) -> None:
    """Report that this worker is about to train, and how it may be recovered.

    Args:
        watcher: channel to the agent.
        options: the user's settings.
        strategy: strategy of the trainer.
    """
    watcher.send(
        EnteredLoop(
            in_place=bool(options.in_place),
            standbys=options.standbys,
            preload_imports=bool(options.preload_imports),
            hang_timeout_s=None if options.hang_timeout_s is None else float(options.hang_timeout_s),
            max_recoveries_without_progress=options.max_recoveries_without_progress,
            max_recoveries_per_hour=options.max_recoveries_per_hour,
            obstacle=_obstacle(strategy),
            bar=str(CONSOLE.bar),
            fixed_world=strategy.obstacle_to_another_world(),
            straggler_factor=float(options.straggler_factor),
            drain_stragglers_after_s=(
                None if options.drain_stragglers_after_s is None else float(options.drain_stragglers_after_s)
            ),
        )
    )


def announce_imports(watcher: Watcher, options: CkptlessOptions) -> None:
    """Report what to import for new processes; one worker per node does so."""
    if not is_first_of_node(local_rank()) or not options.preload_imports:
        return
    if (imported := take_imported()) is not None:
        watcher.send(ProgramImported(imported.modules, imported.variables, imported.path))


def arrival(env: Mapping[str, str], now: float) -> Arrival:
    """The startup figures of this process, which has reached the training loop now.

    Args:
        env: its environment variables.
        now: wall clock, in seconds since the epoch.
    """
    spawned_at = float(env.get(environment.SPAWNED_AT) or now)
    return Arrival(now - spawned_at, count_imported(), Imports(env.get(environment.IMPORTS, Imports.OFF)))


def _obstacle(strategy: Any) -> str | None:
    """Why no new process could reach this point; None if one can."""
    if obstacle := strategy.obstacle_of_calls:
        return str(obstacle)
    if obstacle := strategy.obstacle_in_place():
        return str(obstacle)
    if foreign := strategy.world.foreign_groups():
        return f"the script has created {foreign} process groups of its own, which no new process could re-create"
    return None
