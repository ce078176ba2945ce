"""`ckptless watch`: shows a run while it trains, in the terminal or as a page."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckptless.cli.flags import ArenaDirOfRun, RunRoot
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from lightning_ckptless.cli.survey.reader import RunReader

EVERY_S = 0.5
MOST_SHARE = 0.01
"""Of one core. If the view cost more, it is drawn less often."""
LOOPBACK = "127.0.0.1"
_MOST_RUNS = 20


def watch(
    run: Annotated[str | None, typer.Argument(help="Run id or run folder (default: the only live run).")] = None,
    run_root: RunRoot = None,
    arena_dir: ArenaDirOfRun = None,
    once: Annotated[bool, typer.Option("--once", help="Show the run once, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve a page and /metrics instead.")] = False,
    host: Annotated[str, typer.Option(help="With --web: address to listen on.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="With --web: port to listen on; 0 for a free one.")] = 0,
) -> None:
    """Watch a run: what is protected now, its ranks, tiers, standbys, faults and recoveries.

    Reads files only: the run is not slowed down, and need not respond. Ctrl-C ends the watching, not the run.

    * `ckptless watch`
    * `ckptless watch 20250131-120000-3fa2`
    * `ckptless watch --once --json | jq .protected`
    * `ckptless watch --web`
    """
    _require_consistent(once=once, as_json=as_json, web=web, host=host, port=port)
    folder = _folder_of(run, run_root, arena_dir)
    from rich.console import Console

    from lightning_ckptless.cli.survey.reader import RunReader
    from lightning_ckptless.cli.survey.survey import as_json as to_json
    from lightning_ckptless.cli.survey.survey import survey_of
    from lightning_ckptless.cli.view.watch import screen

    reader, console = RunReader(folder, arena_dir), Console()
    if web:
        watch_as_page(reader, host, port)
        return
    found = survey_of(reader.read())
    if as_json:
        typer.echo(to_json(found))
    elif once or found.state in {"ended", "stopped"}:
        console.print(screen(found, console.width, None))
    elif not console.is_terminal:
        raise OptionsError("the output is not a terminal: add --once, or watch in a terminal")
    else:
        watch_in_terminal(reader, console)


def watch_in_terminal(reader: RunReader, console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show a run until it ends or Ctrl-C is pressed, then leave its last state on the terminal.

    Args:
        reader: reads the run.
        console: the terminal.
        wait: waits for a time in seconds.
    """
    from rich.live import Live

    from lightning_ckptless.cli.survey.survey import survey_of
    from lightning_ckptless.cli.view.watch import screen

    began_s = time.process_time()
    found = survey_of(reader.read())
    # What was imported stays: looking through it again and again would cost more than the view.
    gc.freeze()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while found.state != "ended":
                live.update(screen(found, console.width, console.height), refresh=True)
                wait(pause_s(time.process_time() - began_s))
                began_s = time.process_time()
                found = survey_of(reader.read())
    except KeyboardInterrupt:
        pass
    console.print(screen(found, console.width, None))


def watch_as_page(reader: RunReader, host: str, port: int) -> None:
    """Serve a run as a page until Ctrl-C is pressed.

    Args:
        reader: reads the run.
        host: address to listen on.
        port: port to listen on; 0 for a free one.

    Raises:
        OptionsError: it cannot listen there.
    """
    from lightning_ckptless.cli.web.server import WatchedRun, WatchServer, is_loopback, serve

    run = WatchedRun(reader)
    server = WatchServer(run, host, port)
    if not is_loopback(host):
        typer.echo(
            f"ckptless: the page listens on {host}: every host that reaches it can read the status of the run, with "
            "paths, process ids and error messages",
            err=True,
        )
    typer.echo(f"{reader.run_id}: {server.url} (metrics: {server.url}metrics); Ctrl-C ends the page, not the run")
    gc.freeze()
    serve(run, server, pause_s)


def pause_s(cost_s: float) -> float:
    """Return the time until the run is looked at again.

    Args:
        cost_s: CPU time of the last look, in seconds.
    """
    return max(EVERY_S, cost_s / MOST_SHARE)


def _require_consistent(*, once: bool, as_json: bool, web: bool, host: str, port: int) -> None:
    """Refuse options without effect.

    Raises:
        OptionsError: an option needs another one.
    """
    if as_json and not once:
        raise OptionsError("--json prints a run once: add --once")
    if once and web:
        raise OptionsError("--once and --web exclude each other")
    if not web and (host != LOOPBACK or port):
        raise OptionsError("--host and --port are those of a page: add --web")


def _folder_of(run: str | None, run_root: Path | None, arena_dir: Path | None) -> Path:
    """Return the folder of the run to watch.

    Raises:
        OptionsError: there is no such run, it belongs to another user, or no run is named and not exactly one is live.
    """
    from lightning_ckptless.cli.runs import find_folder, newest_folders

    if run is None:
        folders = newest_folders(run_root)[:_MOST_RUNS]
        live = [folder for folder in folders if _is_mine(folder) and _is_live(folder, arena_dir)]
        if len(live) == 1:
            return live[0]
        if not folders:
            return find_folder(None, run_root)
        names = ", ".join(folder.name for folder in live or folders)
        what = f"{len(live)} runs are live" if live else "no run is live; the newest runs"
        raise OptionsError(f"{folders[0].parent}: {what}: {names}: name one, as in `ckptless watch RUN`")
    folder = find_folder(run, run_root)
    if not _is_mine(folder):
        owner = (folder / LEDGER_NAME).stat().st_uid
        raise OptionsError(
            f"{folder}: the run belongs to user {owner}, and you are user {os.getuid()}: only its own user can read "
            "its shared memory"
        )
    return folder


def _is_mine(folder: Path) -> bool:
    return (folder / LEDGER_NAME).stat().st_uid == os.getuid()


def _is_live(folder: Path, arena_dir: Path | None) -> bool:
    from lightning_ckptless.cli.survey.reader import RunReader
    from lightning_ckptless.cli.survey.survey import survey_of

    return survey_of(RunReader(folder, arena_dir).read()).state in {"running", "starting", "silent"}
