"""Command lines, parsed without torch: that of the interpreter, and that of `ckptless run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_ckptless.configuration.flags import switches
from lightning_ckptless.membership.launch.config import LaunchConfig

Source = Literal["script", "module", "command", "stdin"]

_WITH_VALUE = "WX"
_LONG_WITH_VALUE = "--check-hash-based-pycs"

_SWITCHES_OF_TORCHRUN = frozenset(
    {"-h", "--help", "-m", "--module", "--standalone", "--no-python", "--run-path", "--virtual-local-rank"}
)
SWITCHES_OF_RUN = _SWITCHES_OF_TORCHRUN | switches(LaunchConfig)
"""Options of `ckptless run` that take no value."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line of the interpreter.

    Args:
        flags: its options, one word each, e.g. `("-O", "-Xdev")`; without those that select what to run.
        source: where the script comes from: a file, `-m`, `-c`, or standard input or the prompt.
        target: the file, the module or the code; empty for standard input.
        args: the remaining words.
    """

    flags: tuple[str, ...]
    source: Source
    target: str
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunArguments:
    """What follows `ckptless run`.

    Args:
        options: options of `ckptless run`, with their values.
        script: the script or module and its own arguments.
    """

    options: tuple[str, ...]
    script: tuple[str, ...]


def split_run_arguments(words: Sequence[str]) -> RunArguments:
    """Separate the options of `ckptless run` from the script and its arguments.

    torchrun's parser does the same, but importing it takes as long as importing torch.

    Args:
        words: what follows `ckptless run`.
    """
    at = 0
    while at < len(words) and words[at].startswith("-"):
        word, at = words[at], at + 1
        if word == "--":
            break
        holds_value = "=" in word or (len(word) > 2 and not word.startswith("--"))
        if not holds_value and word.replace("_", "-") not in SWITCHES_OF_RUN:
            at += 1
    return RunArguments(tuple(words[:at]), tuple(words[at:]))


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Parse a command line as the interpreter does.

    Args:
        words: as in `sys.orig_argv`: the interpreter first.
    """
    flags: list[str] = []
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if word == "-":
            return CommandLine(tuple(flags), "stdin", "", tuple(rest))
        if word == "--" and rest:
            word = rest.pop(0)
            return CommandLine(tuple(flags), "script", word, tuple(rest))
        if not word.startswith("-"):
            return CommandLine(tuple(flags), "script", word, tuple(rest))
        if word.startswith("--"):
            flags.append(f"{word}={rest.pop(0)}" if word == _LONG_WITH_VALUE else word)
            continue
        found = _parse_letters(word[1:], rest, flags)
        if found is not None:
            return CommandLine(tuple(flags), *found, tuple(rest))
    return CommandLine(tuple(flags), "stdin", "", ())


def _parse_letters(letters: str, rest: list[str], flags: list[str]) -> tuple[Source, str] | None:
    """Parse one word of options, e.g. `Bum` with the module in the next word. Consumes what it needs of `rest`."""
    for position, letter in enumerate(letters):
        if letter in "cm" or letter in _WITH_VALUE:
            value = letters[position + 1 :] or (rest.pop(0) if rest else "")
            if letter in _WITH_VALUE:
                flags.append(f"-{letter}{value}")
                return None
            return ("command" if letter == "c" else "module"), value
        flags.append(f"-{letter}")
    return None
