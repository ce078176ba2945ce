"""Generates parts of `docs/configuration.md` and `docs/environment.md` from the code: `python -m tests.house.options`.

The prose below an option's heading is written by hand. Its heading, the line below it, the overview, and the tables of
environment variables are derived from the options and from `environment.py`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping

from lightning_ckptless import environment
from lightning_ckptless.configuration.flags import metavar_of
from lightning_ckptless.configuration.option import Option, options_of
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.options import CkptlessOptions
from tests.house.code import REPOSITORY

CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
ENVIRONMENT = REPOSITORY / "docs" / "environment.md"
WIDTH = 100

GUIDES = {
    environment.FAULTS: "[Fault injection](faults.md)",
    environment.TRACE_DIR: "[Fault injection](faults.md)",
    environment.RDZV_ENDPOINT: "[Multiple nodes](launching.md#multiple-nodes)",
    environment.NNODES: "[Elastic runs](elastic.md)",
    environment.FAILURE_DOMAIN: "[Failure domains](nodes.md#failure-domains)",
    environment.FAILURE_DOMAINS_FILE: "[Failure domains](nodes.md#failure-domains)",
    environment.UNTESTED_VERSIONS: "[Newer versions](compatibility.md#newer-versions)",
    environment.IMPORTS: "[`preload_imports`](configuration.md#preload_imports)",
}
"""Environment variables, and the page that says more of each."""

_TABLE = re.compile(r"(?:^\|.*\|(?:\n|\Z))+", re.MULTILINE)
_HEADING = re.compile(r"^(#{2,3}) (.*)$", re.MULTILINE)


def configuration_text(page: str) -> str:
    """The page of the options, with the prose of the page as it is."""
    sections = dict(_sections(page))
    before, after = _TABLE.split(sections[""], maxsplit=1)
    parts = [before.rstrip() + "\n\n" + _overview() + after.rstrip()]
    parts.append("## Strategy names\n\n" + sections["Strategy names"])
    for group in CkptlessOptions.__bases__:
        parts.append(f"## {group.__name__.removesuffix('Options')} options\n\n{group.__doc__}")
        for option in options_of(group).values():
            prose = re.sub(r"\A\*Default\*.*?\n\n", "", sections[f"`{option.name}`"], flags=re.DOTALL)
            parts.append(f"### `{option.name}`\n\n{head_line(option)}\n\n{prose}")
    return "\n\n".join(parts) + "\n"


def _sections(page: str) -> Iterator[tuple[str, str]]:
    """The headings of a page, each with the text below it, and first what is above them all."""
    found = list(_HEADING.finditer(page))
    yield "", page[: found[0].start()].strip()
    ends = [heading.start() for heading in found[1:]] + [len(page)]
    for heading, end in zip(found, ends, strict=True):
        yield heading[2], page[heading.end() : end].strip()


def _overview() -> str:
    rows = (
        f"| [`{option.name}`](#{option.name}) | `{option.default!r}` | {option.about.help} |"
        for option in options_of(CkptlessOptions).values()
    )
    return "\n".join(["| Option | Default | Meaning |", "|---|---|---|", *rows]) + "\n"


def head_line(option: Option) -> str:
    """The text below the heading of an option."""
    about = option.about
    default = f"`{option.default!r}`" + (f", for {about.none}" if about.none else "")
    values = re.sub(r"\[.*?\]|'[^']+'|\bNone\b", r"`\g<0>`", option.range.expected)
    parts = [f"*Default*: {default}.", f"*Values*: {values}{f' ({about.unit})' if about.unit else ''}."]
    asked = options_of(LaunchConfig).get(option.name)
    if asked is not None and asked.about.none == "the strategy's":
        parts.append(f"*Command line*: {_flag(asked)}.")
    if about.variable:
        parts.append(f"*Environment*: `{about.variable}`.")
    return textwrap.fill(" ".join(parts), WIDTH, break_long_words=False, break_on_hyphens=False)


def _flag(option: Option) -> str:
    flag = option.about.flag
    if option.kind is bool:
        return f"`{flag}`, `{flag.replace('--', '--no-', 1)}`"
    return f"`{flag} {metavar_of(option)}`"


def environment_text(page: str) -> str:
    """The page of the environment variables, with the prose of the page as it is."""
    overriding = {
        option.about.variable: f"{option.about.help}; overrides [`{option.name}`](configuration.md#{option.name})"
        for option in options_of(CkptlessOptions).values()
        if option.about.variable
    }
    made = iter([_variables({**environment.SET_BY_USER, **overriding}), _variables(environment.SET_BY_AGENT)])
    return _TABLE.sub(lambda _: next(made), page)


def _variables(meanings: Mapping[str, str]) -> str:
    rows = (
        f"| `{name}` | {meaning}{f'; see {GUIDES[name]}' if name in GUIDES else ''} |"
        for name, meaning in meanings.items()
    )
    return "\n".join(["| Variable | Meaning |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    CONFIGURATION.write_text(configuration_text(CONFIGURATION.read_text()))
    ENVIRONMENT.write_text(environment_text(ENVIRONMENT.read_text()))
