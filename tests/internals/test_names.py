"""Private names of torch and Lightning are checked before they are used, and the tables are complete."""

from __future__ import annotations

import ast

import pytest

from lightning_ckptless.errors import VersionError
from lightning_ckptless.internals import names, torch_names
from tests.house.code import PACKAGE, private_names, sources

TABLES = torch_names.WORKER | torch_names.SHARDED | torch_names.AGENT


class Base:
    """A class with names defined in different ways."""

    annotated: int
    by_class = 1

    def __init__(self) -> None:
        self.by_object = 2

    @property
    def computed(self) -> int:
        return self.by_object + self.inner

    @classmethod
    def made(cls) -> int:
        return cls.of_class

    inner: int
    of_class: int


class Derived(Base):
    """Inherits all names."""


@pytest.mark.parametrize("name", ["annotated", "by_class", "by_object", "computed", "inner", "of_class", "made"])
@pytest.mark.parametrize("owner", [Base, Derived])
def test_a_class_has_the_names_of_its_objects(owner: type, name: str) -> None:
    assert names.has(owner, name)


def test_a_class_has_no_other_names() -> None:
    assert not names.has(Base, "elsewhere")
    assert not names.has(ast, "elsewhere")


def test_missing_names_are_reported_with_their_owner() -> None:
    table = {"ast": "parse gone", "ast:AST": "_fields _gone", "ast:Gone": "any", "no_such_module": "thing"}
    assert list(names.missing(table)) == ["ast.gone", "ast.AST._gone", "ast.Gone.any", "no_such_module.thing"]


def test_one_error_lists_all_missing_names() -> None:
    with pytest.raises(VersionError) as raised:
        names.require("torch", "9.1.0", {"ast": "_gone", "ast:AST": "_away"})
    assert str(raised.value).startswith("torch 9.1.0 lacks ast._gone, ast.AST._away, ")


def test_the_installed_torch_has_every_name() -> None:
    torch_names.require(TABLES)


def test_a_worker_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.parallel import DistributedDataParallel

    monkeypatch.delattr(DistributedDataParallel, "_update_process_group")
    with pytest.raises(VersionError, match=r"DistributedDataParallel\._update_process_group"):
        torch_names.require(torch_names.WORKER)


def test_the_tables_list_every_private_name_of_torch() -> None:
    """Except the variants for different versions, which are selected by feature."""
    known = {name for wanted in TABLES.values() for name in wanted.split()}
    known |= {place.rpartition(":")[2] for place in TABLES}
    used = {
        name.rpartition(".")[2]
        for source in sources(PACKAGE)
        if source.module in {"internals.torch_internals", "internals.mesh_internals"}
        for _, name in private_names(source)
    }
    # `_StorageInfo`: its module takes half a second to import, and is needed only for exports.
    assert used - known == {"_stdout_tail", "_stderr_tail", "_tail_logs", "_StorageInfo"}
