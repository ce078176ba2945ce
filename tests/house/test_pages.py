"""Generated and quoted passages of the pages: the command line, messages, terms."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.launch.torchrun import config_from_torchrun_args, options_parser
from tests.house import options
from tests.house.code import PACKAGE, REPOSITORY, sources
from tests.house.command_line import FROM_TORCHRUN, PAGE, REFUSED, WITHOUT_EFFECT, page_text

VALUES = {"--virtual-local-rank": [], "--numa-binding": ["node"]}
PLACEHOLDER = re.compile(r"%[.\d]*[sdfg]")


def page(name: str) -> str:
    """The text of a page."""
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def rows(text: str, head: str) -> Iterator[list[str]]:
    """The cells of all rows of all tables whose first column has this head."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if cells[0][0] == head:
            yield from cells[2:]


def templates() -> list[str]:
    """Every text of the package, with `…` in the place of what is filled in."""

    def text_of(node: ast.Constant | ast.JoinedStr) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)

    nodes = [node for source in sources(PACKAGE) for node in source.nodes]
    left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    left_out |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    return [
        PLACEHOLDER.sub("…", text_of(node))
        for node in nodes
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in left_out
    ]


def most_alike(text: str, known: list[str]) -> str:
    """The text that shares most words with a message that has changed."""
    wanted = set(re.findall(r"\w{3,}", text))

    def shared(candidate: str) -> float:
        found = set(re.findall(r"\w{3,}", candidate))
        return len(wanted & found) - 0.02 * len(found)

    return max(known, key=shared)


def test_command_line_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page_text(), "write it again: python -m tests.house.command_line"


@pytest.mark.parametrize(
    ("path", "text_of"),
    [(options.CONFIGURATION, options.configuration_text), (options.ENVIRONMENT, options.environment_text)],
)
def test_pages_of_options_and_variables_are_up_to_date(path: Path, text_of: Callable[[str], str]) -> None:
    assert path.read_text() == text_of(path.read_text()), "write it again: python -m tests.house.options"


def test_every_option_of_torchrun_is_documented() -> None:
    known = {*FROM_TORCHRUN, *REFUSED, *WITHOUT_EFFECT}
    offered = {
        next(text for text in action.option_strings if text.startswith("--"))
        for group in options_parser()._action_groups
        for action in group._group_actions
        if action.option_strings and group.title != "ckptless" and action.dest != "help"
    }
    assert offered <= known


@pytest.mark.parametrize("option", REFUSED)
def test_refused_options_of_torchrun(option: str) -> None:
    if not any(option in action.option_strings for action in options_parser()._actions):
        pytest.skip(f"this version of torchrun has no {option}")
    with pytest.raises(OptionsError, match=f"{option} is not supported"):
        config_from_torchrun_args([option, *VALUES.get(option, ["x"]), "train.py"])


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    known = templates()
    everything = "\n".join(known)
    # A message of another project is introduced by its name.
    quoted = [
        text
        for row in rows(page("troubleshooting"), "Message")
        if not row[0].startswith("Lightning:")
        for text in re.findall(r"`([^`]+)`", row[0])
    ]
    assert len(quoted) > 100
    unknown = {}
    for text in quoted:
        parts = [re.escape(part.strip()) for part in text.split("…") if part.strip()]
        if not re.search(".*".join(parts), everything):
            unknown[text] = most_alike(text, known)
    assert unknown == {}


def test_contributing_names_targets_and_files_that_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in re.findall(r"(?:`|\$ )make ([a-z -]+)", text) for word in line.split()}
    assert named
    assert named <= targets
    files = re.findall(r"\b(?:tests|docs|lightning_ckptless)/[\w./-]+\w", text)
    assert [path for path in files if not (REPOSITORY / path).exists()] == []


def test_glossary_is_in_order() -> None:
    terms = [row[0] for row in rows(page("glossary"), "Term")]
    assert terms == sorted(set(terms))
