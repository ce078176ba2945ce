"""`ckptless status`: shows the arenas and the history of a run, during the run or after it.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

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
    from lightning_ckptless.cli.runs import find_folder

    # Report a wrong name before the slow import of torch.
    folder = find_folder(run, run_root)
    from lightning_ckptless.cli.survey.reader import RunReader
    from lightning_ckptless.cli.survey.survey import as_json as to_json
    from lightning_ckptless.cli.survey.survey import survey_of
    from lightning_ckptless.cli.view.status import show_status

    found = survey_of(RunReader(folder, arena_dir).read())
    if as_json:
        typer.echo(to_json(found))
    else:
        show_status(found)
