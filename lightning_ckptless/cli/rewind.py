"""`ckptless rewind`: takes a live run back to an earlier step.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_ckptless.cli.flags import RunRoot

ANSWER_TIMEOUT_S = 60.0


def rewind(
    run: Annotated[str, typer.Argument(help="Run id or run folder.")],
    to_step: Annotated[int | None, typer.Option(metavar="N", min=0, help="Optimizer step to return to.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="K", min=1, help="Optimizer steps to go back.")] = None,
    skip_batches: Annotated[
        int, typer.Option(metavar="M", min=0, help="Batches of each rank to skip from there on.")
    ] = 0,
    run_root: RunRoot = None,
) -> None:
    """Take all ranks of a live run back to an earlier step, which its history contains (`history=` of the strategy).

    * `ckptless rewind 20250131-120000-3fa2 --to-step 120`
    * `ckptless rewind 20250131-120000-3fa2 --steps 8 --skip-batches 16`

    The exit code is 1 if the ranks refuse.
    """
    from lightning_ckptless.cli.runs import find_live_run
    from lightning_ckptless.errors import OptionsError
    from lightning_ckptless.membership.requests import RewindRequest, submit

    if (to_step is None) == (steps is None):
        raise OptionsError("set one of --to-step and --steps")
    found = find_live_run(run, run_root, to_do="rewind")
    answer = submit(found.folder, RewindRequest(to_step, steps, skip_batches), timeout_s=ANSWER_TIMEOUT_S)
    typer.echo(f"rewinding {answer.reason}" if answer.accepted else f"not rewound: {answer.reason}")
    if not answer.accepted:
        raise typer.Exit(1)
