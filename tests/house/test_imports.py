"""Imports have one direction: each layer imports only what the table allows."""

from __future__ import annotations

import re

from tests.house.code import PACKAGE, REPOSITORY, Source, findings, sources

# What any layer may import. These import nothing else of this package.
BASE = {
    "configuration", "console", "distributions", "environment", "errors", "formats", "internals", "options", "system",
}  # fmt: skip
# What each layer may import from the package. A top-level folder or file is a layer, and so is any other entry.
MAY_IMPORT = {
    "configuration": {"configuration", "errors"},
    "console": set[str](),
    "distributions": set[str](),
    "environment": {"system"},
    "errors": set[str](),
    "formats": {"formats", "internals"},
    "internals": {"internals", "errors"},
    "internals.lightning": {
        "internals", "internals.lightning", "console", "distributions", "errors", "formats", "protocol",
    },
    "options": {"configuration", "environment", "errors"},
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
        "_registration", "distributions", "environment", "supported", "internals", "internals.lightning",
    },
    "lightning_pytorch": {"_registration", "runner", "testing", "trainer"},
    "pytorch_lightning": {"_registration", "runner", "testing", "trainer"},
    "cli": {
        "cli", "runner", "testing", "durable", "membership", "replica", "protocol", "ledger", "metrics", "supported",
        "internals.lightning", *BASE,
    },
    "__init__": {
        "_registration", "distributions", "errors", "lightning_pytorch", "metrics", "options", "supported",
    },
}  # fmt: skip
# `protocol` only decides: it reads no clock and performs no I/O.
PURE = {
    "__future__", "abc", "bisect", "collections", "dataclasses", "difflib", "enum", "functools", "heapq", "itertools",
    "json", "math", "operator", "re", "textwrap", "typing",
}  # fmt: skip
# The forecast simulates with random numbers that are passed in, and parses dates without reading the clock.
PURE_OF_FORECAST = {"numpy", "datetime"}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
CODE = sources(PACKAGE)


def layer_of(module: str) -> str:
    """The layer of a module or name below the package: its first two parts if the table has them, else the first."""
    parts = module.split(".")
    both = ".".join(parts[:2])
    return both if both in MAY_IMPORT else parts[0]


def test_layers_import_only_what_they_may() -> None:
    def unknown(source: Source) -> set[str]:
        inside = (name.removeprefix(f"{PACKAGE}.") for name in source.imports() if name.startswith(f"{PACKAGE}."))
        return {layer_of(name) for name in inside} - MAY_IMPORT[layer_of(source.module)]

    assert findings(CODE, unknown) == {}


def test_protocol_is_pure() -> None:
    def impure(source: Source) -> set[str]:
        extra = PURE_OF_FORECAST if source.module.startswith("protocol.forecast.") else set[str]()
        return {name.split(".")[0] for name in source.imports()} - PURE - extra - {PACKAGE}

    assert findings((source for source in CODE if source.layer == "protocol"), impure) == {}


def test_each_distribution_of_lightning_is_imported_by_one_file() -> None:
    """All other files load what they need by name, because there are two distributions."""
    found = findings(CODE, lambda source: {name.split(".")[0] for name in source.imports()} & LIGHTNING)
    assert found == {
        f"{PACKAGE}/lightning_pytorch.py": ["lightning"],
        f"{PACKAGE}/pytorch_lightning.py": ["pytorch_lightning"],
    }


def test_files_of_both_distributions_are_the_same() -> None:
    one, other = (
        (REPOSITORY / PACKAGE / f"{name}.py").read_text() for name in ("lightning_pytorch", "pytorch_lightning")
    )
    swapped = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning.py": "lightning_pytorch.py"}
    names = re.compile(r"pytorch_lightning\.py|lightning\.pytorch")
    assert names.sub(lambda found: swapped[found[0]], one) == other


def test_table_has_all_layers_and_no_others() -> None:
    assert set(MAY_IMPORT) == {layer_of(source.module) for source in CODE}


def test_layers_form_no_cycle() -> None:
    needs = {layer: others - {layer} for layer, others in MAY_IMPORT.items()}
    while leaves := {layer for layer, others in needs.items() if not others}:
        needs = {layer: others - leaves for layer, others in needs.items() if layer not in leaves}
    assert needs == {}


def test_modules_form_no_cycle() -> None:
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
