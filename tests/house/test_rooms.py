"""Imports run one way, and every room keeps to what it may know."""

from __future__ import annotations

from tests.house.code import PACKAGE, Source, findings, sources

BASE = {
    "console", "control_groups", "environment", "errors", "formats", "memory_files", "mesh_internals", "options",
    "private_files", "torch_internals", "torch_names",
}  # fmt: skip
# What each room may import from the package. A file of the top floor counts as a room, and so does one that is named.
MAY_IMPORT = {
    "console": set[str](),
    "control_groups": set[str](),
    "environment": {"private_files"},
    "errors": set[str](),
    "formats": {"formats", "torch_internals"},
    "memory_files": set[str](),
    "options": {"errors"},
    "private_files": set[str](),
    "torch_internals": set[str](),
    "mesh_internals": {"mesh_versions"},
    "mesh_versions": {"names"},
    "names": {"errors"},
    "supported": {"environment", "errors"},
    "torch_names": {"names"},
    "protocol": {"protocol", "errors", "options"},
    "replica": {"replica", "protocol", *BASE},
    "membership": {"membership", "protocol", *BASE},
    "durable": {"durable", "replica", "protocol", "ledger", *BASE},
    "ledger": {"errors", "formats"},
    "metrics": {"protocol"},
    "trainer": {"trainer", "durable", "replica", "membership", "protocol", "ledger", "metrics", "names", *BASE},
    "callbacks": {"callbacks", "testing.digest", "trainer", "protocol", "ledger", *BASE},
    "testing": {"testing", "job", "membership", "protocol", "ledger", "trainer", "callbacks", *BASE},
    "testing.digest": set[str](),
    "job": {"trainer", "ledger", "membership", "protocol", "replica", *BASE},
    "assembly": {"callbacks", "supported", "torch_names", "trainer"},
    "mlflow_tables": {"environment"},
    "registration": {"_autoload", "assembly", "mlflow_tables"},
    "_autoload": {"registration"},
    "cli": {
        "cli",
        "job",
        "testing",
        "durable",
        "membership",
        "replica",
        "protocol",
        "ledger",
        "metrics",
        "supported",
        *BASE,
    },
    "__init__": {"_autoload", "assembly", "callbacks", "errors", "metrics", "options", "supported"},
}
# `protocol` decides: it has no clock, opens nothing, and could be run in the head.
PURE = {
    "__future__", "abc", "bisect", "collections", "dataclasses", "difflib", "enum", "functools", "heapq", "itertools",
    "json", "math", "operator", "re", "textwrap", "typing",
}  # fmt: skip
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
        return {name.split(".")[0] for name in source.imports()} - PURE - {PACKAGE}

    assert findings((source for source in CODE if source.room == "protocol"), impure) == {}


def test_lightning_is_known_to_the_host_room_alone() -> None:
    """The host room loads what it needs by name, because there are two distributions."""
    assert findings(CODE, lambda source: [n for n in source.imports() if n.split(".")[0] in LIGHTNING]) == {}


def test_the_table_has_no_room_that_is_gone() -> None:
    assert set(MAY_IMPORT) == {room_of(source.module) for source in CODE}


def test_no_room_reaches_itself_through_another() -> None:
    """The table has no circle, but for the registration, which the hook loads when it can catch what goes wrong."""
    needs = {room: others - {room} for room, others in MAY_IMPORT.items()}
    needs["_autoload"] = set()
    while leaves := {room for room, others in needs.items() if not others}:
        needs = {room: others - leaves for room, others in needs.items() if room not in leaves}
    assert needs == {}
