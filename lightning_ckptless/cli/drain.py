"""`ckptless drain`: moves work off a rank of a live run.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_ckptless.cli.flags import RunRoot

DEFAULT_TIMEOUT_S = 300.0


def drain(
    rank: Annotated[int, typer.Option(min=0, metavar="R", help="Rank whose process is to exit.")],
    run: Annotated[str | None, typer.Argument(help="Run id or run folder (default: the newest run).")] = None,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", min=0.0, metavar="SECONDS", help="Longest wait for an agent, and for the hand-over."),
    ] = DEFAULT_TIMEOUT_S,
    run_root: RunRoot = None,
) -> None:
    """Hand a rank of a live run over to a new process, at a committed step and without replaying one.

    * `ckptless drain --rank 3`
    * `ckptless drain 20250131-120000-3fa2 --rank 0`

    The new process is made ready first, while training continues. Waits until it has taken the rank.
    """
    from lightning_ckptless.cli.runs import find_run
    from lightning_ckptless.errors import LaunchError
    from lightning_ckptless.membership.requests import DrainRequest, submit

    found = find_run(run, run_root)
    started, ended = found.of("run_started"), found.of("run_ended")
    if ended and ended[-1].at >= started[-1].at:
        raise LaunchError(f"{found.run_id} has ended: there is nothing to drain")
    answer = submit(found.folder, DrainRequest(rank=rank), timeout_s=timeout_s)
    if not answer.accepted:
        raise LaunchError(answer.reason)
    typer.echo(answer.reason)
