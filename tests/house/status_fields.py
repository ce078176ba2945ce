"""The table of fields that `ckptless status --json` prints: `python -m tests.house.status_fields`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from lightning_ckptless.cli.survey.alarms import Alarm, Fault
from lightning_ckptless.cli.survey.members import Member
from lightning_ckptless.cli.survey.protection import Protected
from lightning_ckptless.cli.survey.survey import ArenaLine, Pace, SlotLine, Standbys, Survey, Tier
from lightning_ckptless.protocol.placement_table import PlacementTable

INSIDE: dict[str, type[Any]] = {
    "protected": Protected,
    "alarms[]": Alarm,
    "members[]": Member,
    "pace": Pace,
    "tiers[]": Tier,
    "standbys": Standbys,
    "plan": PlacementTable,
    "arenas[]": ArenaLine,
    "slots[]": SlotLine,
    "faults[]": Fault,
}
"""What fields contain, by their names; `[]` marks a list."""


def rows() -> Iterator[tuple[str, str]]:
    """All fields with their meaning."""
    for name, about in _described(Survey):
        yield name, about
        for path, inside in INSIDE.items():
            if path.removesuffix("[]") == name:
                yield from ((f"{path}.{inner}", meaning) for inner, meaning in _described(inside))


def _described(cls: type[Any]) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass with what its docstring says of each."""
    documented = (inspect.getdoc(cls) or "").partition("Args:\n")[2]
    for field in fields(cls):
        match = re.search(rf"^ +{field.name}: (.*(?:\n {{8}}.*)*)", documented, re.MULTILINE)
        assert match is not None, f"{cls.__name__}.{field.name}"
        yield field.name, " ".join(match[1].split()).rstrip(".").replace("None", "null")


def table_text() -> str:
    """The table as it is in the page."""
    lines = [f"| `{name}` | {about} |" for name, about in rows()]
    return "\n".join(["| Field | Content |", "|---|---|", *lines])


if __name__ == "__main__":
    print(table_text())
