"""`ckptless clean`: removes shared memory and temporary folders that no run uses any more.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_ckptless.cli.flags import ArenaDir


def clean(
    run: Annotated[str | None, typer.Argument(help="Run id (default: all runs).")] = None,
    arena_dir: ArenaDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, without removing it.")
    ] = False,
) -> None:
    """Remove the arenas of runs whose agents have exited, and the temporary folders of killed agents.

    Files of live runs are kept. With a run id, only the arenas of that run are removed.

    * `ckptless clean --dry-run`
    * `ckptless clean 20250131-120000-3fa2`

    Exit code: 0, or 1 if the given run is alive.
    """
    from rich.filesize import decimal

    from lightning_ckptless.membership.agent.scratch import find_abandoned, remove_abandoned
    from lightning_ckptless.replica.arena import default_arena_dir
    from lightning_ckptless.replica.arena_cleanup import find_abandoned_arenas, remove_abandoned_arena

    folder = arena_dir or default_arena_dir()
    abandoned, alive = find_abandoned_arenas(folder, run)
    for path in alive:
        typer.echo(f"kept {path}: its agent is alive", err=run is not None)
    for path, size_bytes in abandoned:
        if dry_run or remove_abandoned_arena(path):
            typer.echo(f"{'would remove' if dry_run else 'removed'} {path} ({decimal(size_bytes)})")
        else:
            typer.echo(f"kept {path}: an agent has just adopted it")
    scratch = find_abandoned() if run is None else []
    for path in scratch:
        if dry_run or remove_abandoned(path):
            typer.echo(f"{'would remove' if dry_run else 'removed'} {path}: temporary files of a killed agent")
    if not abandoned and not alive and not scratch:
        typer.echo(f"no arenas {'of ' + run if run else ''} in {folder}".replace("  ", " "))
    raise typer.Exit(1 if run is not None and alive else 0)
