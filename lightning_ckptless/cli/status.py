"""`ckptless status`: shows the arenas and the history of a run, during the run or after it.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from lightning_ckptless.cli.flags import ArenaDirOfRun, RunRoot


def status(
    run: Annotated[str | None, typer.Argument(help="Run id or run folder (default: the newest run).")] = None,
    run_root: RunRoot = None,
    arena_dir: ArenaDirOfRun = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a run: versions, shards and their holders, sizes, commit lag and the last recoveries.

    * `ckptless status`
    * `ckptless status 20250131-120000-3fa2 --json`
    """
    from lightning_ckptless.cli.runs import find_run

    # Report a wrong name before the slow import of torch.
    named = find_run(run, run_root)
    from lightning_ckptless.cli.survey import survey
    from lightning_ckptless.cli.view.status import show_status

    found = survey(named, arena_dir, now=time.time())
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=str))
    else:
        show_status(found)
