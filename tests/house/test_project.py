"""Metadata, pins and targets agree with each other."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_ckptless
from tests.house.code import REPOSITORY, Source

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (
    "constraints.txt",
    "benchmarks/rivals/constraints.txt",
    "tests/lab/constraints-loggers.txt",
    "tests/third_party/constraints.txt",
)


def pins(file: str) -> dict[str, Version]:
    """The versions that a file of constraints holds, by name."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


PINS, RIVALS_PINS, LOGGERS_PINS, THIRD_PARTY_PINS = map(pins, CONSTRAINTS)
EXTRAS = chain.from_iterable(PROJECT["optional-dependencies"].values())
REQUIREMENTS = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS)]


def test_requirements_are_pinned_within_their_ranges() -> None:
    others = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]
    pinned = THIRD_PARTY_PINS | LOGGERS_PINS | RIVALS_PINS | PINS
    assert [str(r) for r in others if not r.specifier.contains(pinned[canonicalize_name(r.name)])] == []


def test_rivals_change_no_pin() -> None:
    assert not PINS.keys() & RIVALS_PINS.keys()


def test_tracking_stores_change_no_pin() -> None:
    assert not PINS.keys() & LOGGERS_PINS.keys()


def test_third_party_projects_run_with_the_torch_and_lightning_that_are_tested() -> None:
    same = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy")
    assert [THIRD_PARTY_PINS[name] for name in same] == [PINS[name] for name in same]


def test_the_environment_of_third_party_projects_has_what_all_tests_import() -> None:
    installed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["third-party"]]
    names = {canonicalize_name(Requirement(text).name) for text in installed}
    files = [Source(Path("tests", name)) for name in ("conftest.py", "leaks.py")]
    imported = {name.partition(".")[0] for file in files for name in file.imports()}
    assert imported - sys.stdlib_module_names - {"tests", PROJECT["name"].replace("-", "_")} <= names


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_hold_pins_alone(file: str) -> None:
    lines = [line for line in (REPOSITORY / file).read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(pins(file))


def needs_of(name: str) -> list[str]:
    """What a package needs, where it is installed."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def test_dependencies_of_pins_are_pinned() -> None:
    """For what is installed here: nothing is left to the day of the installation."""
    missing = {
        f"{name} needs {requirement.name}"
        for name in PINS
        for requirement in map(Requirement, needs_of(name))
        if requirement.marker is None and canonicalize_name(requirement.name) not in PINS
    }
    assert missing <= {"tensorboard needs setuptools", "torch needs setuptools"}


def test_version_is_in_the_changelog() -> None:
    assert lightning_ckptless.__version__ == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_public_names_exist() -> None:
    for name in lightning_ckptless.__all__:
        assert getattr(lightning_ckptless, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = lightning_ckptless.Nonsense  # type: ignore[attr-defined]
    assert set(lightning_ckptless.__all__) <= set(dir(lightning_ckptless))


def test_make_help_names_every_target() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split()
    described = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    assert sorted(phony) == sorted(described)
