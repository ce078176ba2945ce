"""Command lines of Python, parsed and reassembled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_ckptless.membership.launch.command_line import (
    SWITCHES_OF_RUN,
    CommandLine,
    RunArguments,
    parse_command_line,
    split_run_arguments,
)
from lightning_ckptless.membership.launch.reexec import agent_command, why_not_again
from lightning_ckptless.membership.launch.torchrun import options_parser

LINES = [
    ("python train.py", CommandLine((), "script", "train.py", ())),
    ("python train.py --lr 0.1 -m x", CommandLine((), "script", "train.py", ("--lr", "0.1", "-m", "x"))),
    ("python -u train.py -u", CommandLine(("-u",), "script", "train.py", ("-u",))),
    ("python -Bu -OO train.py", CommandLine(("-B", "-u", "-O", "-O"), "script", "train.py", ())),
    ("python -X dev -Xutf8 train.py", CommandLine(("-Xdev", "-Xutf8"), "script", "train.py", ())),
    (
        "python -W error -Wignore::UserWarning t.py",
        CommandLine(("-Werror", "-Wignore::UserWarning"), "script", "t.py", ()),
    ),
    ("python -uW error t.py", CommandLine(("-u", "-Werror"), "script", "t.py", ())),
    ("python -m package.train fit --c x", CommandLine((), "module", "package.train", ("fit", "--c", "x"))),
    ("python -mtrain fit", CommandLine((), "module", "train", ("fit",))),
    ("python -Im train -x", CommandLine(("-I",), "module", "train", ("-x",))),
    ("python -c print(1) a", CommandLine((), "command", "print(1)", ("a",))),
    ("python -uc pass", CommandLine(("-u",), "command", "pass", ())),
    ("python - a", CommandLine((), "stdin", "", ("a",))),
    ("python", CommandLine((), "stdin", "", ())),
    ("python -i train.py", CommandLine(("-i",), "script", "train.py", ())),
    ("python -- -odd.py a", CommandLine((), "script", "-odd.py", ("a",))),
    (
        "python --check-hash-based-pycs never train.py",
        CommandLine(("--check-hash-based-pycs=never",), "script", "train.py", ()),
    ),
    ("python /usr/bin/tool.zip x", CommandLine((), "script", "/usr/bin/tool.zip", ("x",))),
    ("python -m", CommandLine((), "module", "", ())),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_parsing(line: str, expected: CommandLine) -> None:
    assert parse_command_line(line.split(" ")) == expected


def test_the_command_line_of_this_process_can_be_parsed() -> None:
    line = parse_command_line(sys.orig_argv)
    # Workers of pytest-xdist are started with a command.
    assert line.source in ("script", "module", "command")
    assert list(line.args) == sys.orig_argv[len(sys.orig_argv) - len(line.args) :]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "python -X dev train.py --lr 0.1",
            "-Xdev -m lightning_ckptless.membership --nproc-per-node=2 --preload=models -- train.py --lr 0.1",
        ),
        (
            "python -m package.train fit",
            "-m lightning_ckptless.membership --nproc-per-node=2 --preload=models -m -- package.train fit",
        ),
    ],
)
def test_the_agents_command_line(line: str, expected: str) -> None:
    options: dict[str, object] = {"--nproc-per-node": 2, "--rdzv-endpoint": None}
    assert agent_command(parse_command_line(line.split(" ")), options, ("models",)) == expected.split(" ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("python train.py", None),
        ("python -m train", None),
        ("python -c pass", "passed with -c"),
        ("python -", "standard input"),
        ("python gone.py", "does not exist in"),
    ],
)
def test_which_scripts_can_be_run_again(line: str, reason: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    found = why_not_again(parse_command_line(line.split(" ")), tmp_path)
    assert (found is None) is (reason is None)
    assert reason is None or (reason in str(found) and "python FILE.py" in str(found))
    assert ("ckptless_notebook" in str(found)) is (reason in ("passed with -c", "standard input"))


@pytest.mark.parametrize(
    ("options", "script"),
    [
        ("", "train.py --no-preload --rdzv-id x"),
        ("--nproc-per-node 2 --no-preload", "train.py"),
        ("--nproc_per_node=2 --no_python -t3 -r 3", "train.sh --standbys 1"),
        ("--no-in-place -m --", "package.train fit"),
        ("--rdzv-id train.py", "other.py"),
        ("--standbys 1 --help", ""),
    ],
)
def test_options_of_run_are_separated_from_the_script(options: str, script: str) -> None:
    expected = RunArguments(tuple(options.split()), tuple(script.split()))
    assert split_run_arguments([*options.split(), *script.split()]) == expected


def test_switches_of_run_are_those_of_its_parser() -> None:
    # Some versions of torchrun lack some of its own.
    offered = {text for action in options_parser()._actions if action.nargs == 0 for text in action.option_strings}
    assert {text.replace("_", "-") for text in offered} <= SWITCHES_OF_RUN
