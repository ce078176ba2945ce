"""`ckptless drain`: moves work off a rank or a node of a live run.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_ckptless.cli.flags import RunRoot

DEFAULT_TIMEOUT_S = 300.0


def drain(
    run: Annotated[str | None, typer.Argument(help="Run id or run folder (default: the newest run).")] = None,
    rank: Annotated[int | None, typer.Option(min=0, metavar="R", help="Rank to drain.")] = None,
    node: Annotated[int | None, typer.Option(min=0, metavar="N", help="Node to drain.")] = None,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", min=0.0, metavar="SECONDS", help="Longest wait for an agent, and for the hand-over."),
    ] = DEFAULT_TIMEOUT_S,
    run_root: RunRoot = None,
) -> None:
    """Move work off a rank or a node of a live run, at a committed step and without replaying one.

    * `ckptless drain --rank 3`
    * `ckptless drain 20250131-120000-3fa2 --node 1`

    What takes over is prepared first, while training continues: a new process for a rank; a spare node, or the other
    nodes, for a node. Returns once the drained processes have exited.
    """
    from lightning_ckptless.cli.runs import find_live_run
    from lightning_ckptless.errors import LaunchError, OptionsError
    from lightning_ckptless.membership.requests import DrainRequest, submit

    if (rank is None) == (node is None):
        raise OptionsError("nothing to drain: give either --rank R or --node N")
    found = find_live_run(run, run_root, to_do="drain")
    answer = submit(found.folder, DrainRequest(node, rank), timeout_s=timeout_s)
    if not answer.accepted:
        raise LaunchError(answer.reason)
    typer.echo(answer.reason)
