"""The registration hook, tested with a stub of Lightning and without importing torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.registration.conftest import Run

NAMES = [
    "ckptless",
    "ckptless_ddp",
    "ckptless_ddp_find_unused_parameters_true",
    "ckptless_ddp_find_unused_parameters_false",
    "ckptless_notebook",
    "ckptless_model_parallel",
]
REGISTRY = """
class Registry(dict):
    def register(self, name, strategy, description):
        assert name not in self
        self[name] = (strategy, description)
StrategyRegistry = Registry()
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A stub package that looks like pytorch_lightning to the hook."""
    package = tmp_path / "stub" / "pytorch_lightning"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "strategies.py").write_text(REGISTRY)
    return package


def test_importing_the_package_loads_only_the_standard_library(run: Run) -> None:
    foreign = run("""
import sys
before = set(sys.modules)
import lightning_ckptless
emit([m for m in set(sys.modules) - before if m.split(".")[0] not in {*sys.stdlib_module_names, "lightning_ckptless"}])
""")
    assert foreign == []


@pytest.mark.parametrize("package", ["membership", "protocol", "replica"])
def test_importing_a_subpackage_does_not_import_lightning(run: Run, package: str) -> None:
    assert not run(f"import sys, lightning_ckptless.{package}; emit([m for m in sys.modules if m == 'lightning'])")


def test_names_are_registered_in_either_order_of_imports(run: Run, site: Path, stub: Path) -> None:
    ours, theirs = "import lightning_ckptless", "import pytorch_lightning.strategies as theirs"
    for code in (f"{ours}\n{theirs}", f"{theirs}\n{ours}"):
        assert run(f"{code}\nemit(list(theirs.StrategyRegistry))", site, stub.parent) == NAMES


def test_the_loader_removes_itself(run: Run, site: Path, stub: Path) -> None:
    """After its import, the module has its own loader, and its source can be found."""
    loader, source = run(
        """
import inspect
import lightning_ckptless
from pytorch_lightning import strategies
emit([type(strategies.__loader__).__name__, inspect.getsource(strategies.Registry).splitlines()[0]])
assert strategies.__spec__.loader is strategies.__loader__
""",
        site,
        stub.parent,
    )
    assert loader == "SourceFileLoader"
    assert source == "class Registry(dict):"


def test_a_spec_has_the_methods_of_the_original_loader(run: Run, site: Path, stub: Path) -> None:
    """Code that inspects a module before importing it can use the methods of its loader."""
    assert run(
        """
import importlib.util
import lightning_ckptless
spec = importlib.util.find_spec("pytorch_lightning.strategies")
emit("class Registry" in spec.loader.get_source("pytorch_lightning.strategies"))
""",
        site,
        stub.parent,
    )


def test_registering_twice_is_harmless(run: Run, site: Path, stub: Path) -> None:
    finders, names = run(
        """
import sys
import lightning_ckptless
from lightning_ckptless._registration.autoload import autoload
from pytorch_lightning.strategies import StrategyRegistry
first = StrategyRegistry["ckptless"]
autoload(); autoload()
assert StrategyRegistry["ckptless"] is first
emit([sum(type(f).__name__ == "RegistryFinder" for f in sys.meta_path), list(StrategyRegistry)])
""",
        site,
        stub.parent,
    )
    assert (finders, names) == (1, NAMES)


def test_a_registered_name_is_not_replaced(run: Run, site: Path, stub: Path) -> None:
    (stub / "strategies.py").write_text(REGISTRY + "StrategyRegistry['ckptless'] = 'theirs'\n")
    owner = run(
        "import lightning_ckptless\n"
        "from pytorch_lightning.strategies import StrategyRegistry\n"
        "emit(StrategyRegistry['ckptless'])",
        site,
        stub.parent,
    )
    assert owner == "theirs"


@pytest.mark.parametrize("registry", ["", "StrategyRegistry = 7", "class StrategyRegistry: __contains__ = None"])
def test_an_unexpected_registry_is_left_alone(run: Run, site: Path, stub: Path, registry: str) -> None:
    (stub / "strategies.py").write_text(f"{registry}\nimported = True")
    assert run(
        "import lightning_ckptless\nfrom pytorch_lightning import strategies\nemit(strategies.imported)",
        site,
        stub.parent,
    )


def test_an_import_error_is_propagated(run: Run, site: Path, stub: Path) -> None:
    (stub / "strategies.py").write_text("raise LookupError('theirs')")
    result = run(
        """
import sys
import lightning_ckptless
try:
    import pytorch_lightning.strategies
except LookupError as error:
    emit([str(error), "pytorch_lightning.strategies" in sys.modules])
""",
        site,
        stub.parent,
    )
    assert result == ["theirs", False]
