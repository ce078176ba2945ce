"""A short file has several importers, or its docstring says why it is a separate file."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

from tests.house.code import PACKAGE, sources

CODE = sources(PACKAGE)
SHORT_LINES = 60
ENTRY_POINTS = {"__init__.py", "__main__.py"}
REASON = re.compile(r"\bApart from .+?,\s+because\s", re.DOTALL)


def importers() -> dict[str, set[str]]:
    """The modules that import each module of the package."""
    names = {source.module.removesuffix(".__init__") for source in CODE}
    found = defaultdict[str, set[str]](set)
    for source in CODE:
        for imported in source.imports():
            if imported.startswith(f"{PACKAGE}."):
                name = imported.removeprefix(f"{PACKAGE}.")
                found[name if name in names else name.rpartition(".")[0]].add(source.module)
    return found


def test_short_file_with_one_importer_gives_a_reason() -> None:
    importers_of = importers()
    unexplained = {
        str(source): sorted(importers_of[source.module])
        for source in CODE
        if source.path.name not in ENTRY_POINTS
        and len(source.text.splitlines()) < SHORT_LINES
        and len(importers_of[source.module]) == 1
        and not REASON.search(ast.get_docstring(source.tree) or "")
    }
    assert unexplained == {}
