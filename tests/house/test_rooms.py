"""Imports run one way, and every room keeps to what it may know."""

from __future__ import annotations

from tests.house.code import PACKAGE, Source, findings, sources

# What any room may use: it knows nothing of this package but itself.
BASE = {"console", "distributions", "environment", "errors", "formats", "internals", "options", "system"}
# What each room may import from the package. A file of the top floor counts as a room, and so does one that is named.
MAY_IMPORT = {
    "console": set[str](),
    "distributions": set[str](),
    "environment": {"system"},
    "errors": set[str](),
    "formats": {"formats", "internals"},
    "internals": {"internals", "errors"},
    "internals.lightning": {
        "internals", "internals.lightning", "console", "distributions", "errors", "formats", "protocol",
    },
    "options": {"errors"},
    "system": {"system"},
    "supported": {"distributions", "environment", "errors"},
    "protocol": {"protocol", "errors", "options"},
    "replica": {"replica", "protocol", *BASE},
    "membership": {"membership", "protocol", *BASE},
    "durable": {"durable", "replica", "protocol", "ledger", *BASE},
    "ledger": {"errors", "formats"},
    "metrics": {"protocol"},
    "trainer": {
        "trainer", "durable", "replica", "membership", "protocol", "ledger", "metrics", "internals.lightning", *BASE,
    },
    "testing": {
        "testing", "runner", "trainer", "membership", "protocol", "ledger", "internals.lightning", *BASE,
    },
    "runner": {"trainer", "ledger", "membership", "replica", "protocol", *BASE},
    "_registration": {
        "_registration", "distributions", "environment", "supported", "internals", "internals.lightning", "runner",
        "testing", "trainer",
    },
    "cli": {
        "cli", "runner", "testing", "durable", "membership", "replica", "protocol", "ledger", "metrics", "supported",
        "internals.lightning", *BASE,
    },
    "__init__": {"_registration", "distributions", "errors", "metrics", "options", "supported", "testing"},
}  # fmt: skip
# `protocol` decides: it has no clock, opens nothing, and could be run in the head.
PURE = {
    "__future__", "abc", "bisect", "collections", "dataclasses", "difflib", "enum", "functools", "heapq", "itertools",
    "json", "math", "operator", "re", "textwrap", "typing",
}  # fmt: skip
# The forecast simulates; its random numbers are given to it, and dates are read but not asked for.
PURE_OF_FORECAST = {"numpy", "datetime"}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
CODE = sources(PACKAGE)


def room_of(module: str) -> str:
    """The room of a module or name, below the package: the two first parts where the table has them, else the first."""
    parts = module.split(".")
    both = ".".join(parts[:2])
    return both if both in MAY_IMPORT else parts[0]


def test_imports_run_one_way() -> None:
    def unknown(source: Source) -> set[str]:
        inside = (name.removeprefix(f"{PACKAGE}.") for name in source.imports() if name.startswith(f"{PACKAGE}."))
        return {room_of(name) for name in inside} - MAY_IMPORT[room_of(source.module)]

    assert findings(CODE, unknown) == {}


def test_protocol_is_pure() -> None:
    def impure(source: Source) -> set[str]:
        extra = PURE_OF_FORECAST if source.module.startswith("protocol.forecast.") else set[str]()
        return {name.split(".")[0] for name in source.imports()} - PURE - extra - {PACKAGE}

    assert findings((source for source in CODE if source.room == "protocol"), impure) == {}


def test_lightning_is_imported_by_no_file() -> None:
    """What is needed of it is loaded by name, because there are two distributions."""
    assert findings(CODE, lambda source: [n for n in source.imports() if n.split(".")[0] in LIGHTNING]) == {}


def test_the_table_has_no_room_that_is_gone() -> None:
    assert set(MAY_IMPORT) == {room_of(source.module) for source in CODE}


def test_no_room_reaches_itself_through_another() -> None:
    """The table has no circle."""
    needs = {room: others - {room} for room, others in MAY_IMPORT.items()}
    while leaves := {room for room, others in needs.items() if not others}:
        needs = {room: others - leaves for room, others in needs.items() if room not in leaves}
    assert needs == {}


def test_no_files_import_each_other() -> None:
    names = {source.module.removesuffix(".__init__") for source in CODE}
    needs = {}
    for source in CODE:
        inside = [name.removeprefix(f"{PACKAGE}.") for name in source.imports() if name.startswith(f"{PACKAGE}.")]
        used = {name if name in names else name.rpartition(".")[0] for name in inside}
        needs[source.module.removesuffix(".__init__")] = used - {source.module}
    needs |= {name: set() for name in set().union(*needs.values()) - needs.keys()}
    while leaves := {name for name, others in needs.items() if not others}:
        needs = {name: others - leaves for name, others in needs.items() if name not in leaves}
    assert needs == {}
