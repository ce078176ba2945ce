"""Writes `docs/command-line.md` from the parsers of the commands: `python -m tests.house.command_line`."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.core import TyperGroup
from typer.main import get_command

from lightning_ckptless.cli.app import app
from lightning_ckptless.membership.launch.torchrun import options_parser
from tests.house.code import REPOSITORY

PAGE = REPOSITORY / "docs" / "command-line.md"
Row = tuple[str, str, str, str]

GUIDES = {
    "run": "[Launching](launching.md)",
    "doctor": "[Checking a machine](doctor.md)",
    "drain": "[Draining a node or a rank](draining.md)",
    "drill": "[Fault injection](faults.md)",
    "forecast": "[Forecast](forecast.md)",
    "status": "[Watching a run](watching.md)",
    "rewind": "[Rewind](rewind.md)",
    "watch": "[Watching a run](watching.md#in-the-terminal)",
    "export": "[Exporting the state as a file](watching.md#exporting-the-state-as-a-file)",
    "clean": "[Shared memory after a run](launching.md#shared-memory-after-a-run)",
    "timeline": "[Watching a run](watching.md)",
}
"""Each command, and the page that explains it."""

INTRODUCTION = """\
# Command line

<!-- Generated from the commands by `python -m tests.house.command_line`. Do not edit. -->

Every command prints its options with `--help`. A mistake on the command line ends with one line on stderr and
[exit code 2](errors.md#exit-codes)."""

TORCHRUN_INTRODUCTION = """\
### Options of torchrun

`ckptless run` takes torchrun's options under torchrun's names. Where torchrun reads a `PET_` variable in place of an
option, so does `ckptless run`."""

FROM_TORCHRUN = {
    "--nnodes": "number of nodes, or a range `MIN:MAX` for a [run of variable size](elastic.md)",
    "--nproc-per-node": "ranks on this node: a number, `cpu`, `gpu` or `auto`",
    "--rdzv-endpoint": "`HOST:PORT` of the rendezvous; several, separated by commas, to survive the loss of one",
    "--rdzv-id": "name of the run; a run without a name is not kept when it is asked to end",
    "--rdzv-conf": "settings of the rendezvous as `KEY=VALUE,...`, e.g. `join_timeout=1800`",
    "--rdzv-backend": "`c10d`; `static` stands for the older `--master-addr`",
    "--standalone": "one node, with a rendezvous of its own",
    "--max-restarts": "recoveries in the life of the agent; without it only `--max-recoveries-*` limit them",
    "--module": "the script is a module, as in `python -m`; short form `-m`",
    "--no-python": "the script is a program of its own, not Python",
    "--log-dir": "folder that receives the output of each worker",
    "--redirects": "which streams go into files of `--log-dir`; short form `-r`",
    "--tee": "which streams go to both the terminal and files; short form `-t`",
    "--local-ranks-filter": "local ranks whose output is shown",
    "--role": "role of the workers, which prefixes their lines",
    "--local-addr": "address of this node, as other nodes reach it",
    "--node-rank": "number of this node, with `--master-addr`",
    "--master-addr": "host of the first node, in place of `--rdzv-endpoint`",
    "--master-port": "its port",
    "--shutdown-timeout": "seconds that workers have to end after SIGTERM",
}
"""What `ckptless run` does with each option that torchrun has."""

WITHOUT_EFFECT = ("--monitor-interval", "--start-method", "--event-log-handler", "--run-path", "--signals-to-handle")
REFUSED = (
    "--logs-specs",
    "--numa-binding",
    "--virtual-local-rank",
    "--duplicate-stdout-filters",
    "--duplicate-stderr-filters",
)


def page_text() -> str:
    """The whole page."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    types = {info.callback.__name__: get_type_hints(info.callback) for info in app.registered_commands if info.callback}
    parts = [INTRODUCTION, _overview(group)]
    for name, command in group.commands.items():
        parts += [f"## `ckptless {name}`", command.help or "", f"Explained in {GUIDES[name]}."]
        parts += _run_tables() if name == "run" else _tables(command.params, types[name])
    return "\n\n".join(parts) + "\n"


def _overview(group: TyperGroup) -> str:
    lines = ["| Command | Does |", "|---|---|"]
    for name, command in group.commands.items():
        summary = (command.help or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(f"| [`ckptless {name}`](#ckptless-{name}) | {summary} |")
    return "\n".join(lines)


def _run_tables() -> Iterator[str]:
    yield "Usage: `ckptless run [OPTIONS] SCRIPT [ARGUMENTS]`"
    yield _table(_run_rows())
    yield TORCHRUN_INTRODUCTION
    yield "\n".join(
        ("| Option | Meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in FROM_TORCHRUN.items()))
    )
    yield f"Accepted, without effect: {_listed(WITHOUT_EFFECT)}."
    yield f"Refused: {_listed(REFUSED)}. Start with `torchrun` where one of them is needed."


def _run_rows() -> Iterator[Row]:
    ours = next(group for group in options_parser()._action_groups if group.title == "ckptless")
    for action in ours._group_actions:
        if action.option_strings[0] in FROM_TORCHRUN:
            continue
        takes_value = action.nargs != 0 and not isinstance(action, BooleanOptionalAction)
        path = "PATH" if action.type is Path else ""
        value = str(action.metavar or path) if takes_value else ""
        text = (action.help or "") % {"default": action.default}
        yield _code(action.option_strings), f"`{value}`" if value else "", "", text


def _tables(params: Sequence[Any], types: dict[str, Any]) -> Iterator[str]:
    arguments = [param for param in params if param.opts[0][0] != "-"]
    options = [param for param in params if param.opts[0][0] == "-"]
    if arguments:
        lines = ["| Argument | Meaning |", "|---|---|"]
        yield "\n".join(lines + [f"| `{(p.metavar or p.name).upper()}` | {_sentence(p.help)} |" for p in arguments])
    yield _table(_option_row(param, types[param.name]) for param in options)


def _option_row(param: Any, hint: Any) -> Row:
    """One option of a command that Typer parses.

    Args:
        param: of the command.
        hint: type of the function's parameter.
    """
    kinds = {hint, *get_args(hint)}
    enum = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)
    if enum is not None:
        value = ", ".join(f"`{member.value}`" for member in enum)
    elif param.is_flag:
        value = ""
    else:
        value = f"`{param.metavar or ('PATH' if 'Path' in str(hint) else param.name.upper())}`"
    default = param.default.value if isinstance(param.default, Enum) else param.default
    number = f"{default:g}" if isinstance(default, float) else default
    shown = "" if default in (None, False) or param.multiple else f"`{number}`"
    return _code([*param.opts, *param.secondary_opts]), value, shown, _sentence(param.help)


def _table(rows: Iterator[Row]) -> str:
    lines = ["| Option | Value | Default | Meaning |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _listed(names: Sequence[str]) -> str:
    return _code(names[:-1]) + f" and `{names[-1]}`"


if __name__ == "__main__":
    PAGE.write_text(page_text())
