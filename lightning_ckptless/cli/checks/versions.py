"""Versions of Python, torch and Lightning, against what the metadata of this package asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lightning_ckptless.cli.checks.check import Check, Status

OURS = "lightning-ckptless"
LIGHTNINGS = ("lightning", "pytorch-lightning")
"""Two distributions of the same code, one of which is enough."""


def required() -> dict[str, SpecifierSet]:
    """What this package asks for, by name; of what several extras ask for, all of it."""
    found = {"Python": SpecifierSet(metadata(OURS)["Requires-Python"] or "")}
    for requirement in map(Requirement, requires(OURS) or []):
        found[requirement.name] = found.get(requirement.name, SpecifierSet()) & requirement.specifier
    return found


def installed(name: str) -> str | None:
    """The version of a distribution that is installed; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_version(name: str, found: str | None, wanted: SpecifierSet) -> Check:
    """Whether a version is in the range that is supported; a build before a release counts as that release.

    Args:
        name: of the distribution, or `Python`.
        found: its version; None where it is not installed.
        wanted: the range.
    """
    expected = str(wanted) or "any version"
    install = f"pip install '{name}{wanted}'" if name != "Python" else f"use a Python that is {wanted}"
    if found is None:
        return Check(name, Status.FAILURE, "not installed", expected, install)
    # Container images have builds such as 2.8.0a0+5228986c39, with all that the release has.
    if wanted.contains(Version(found).base_version):
        return Check(name, Status.OK, found, expected)
    return Check(name, Status.FAILURE, found, expected, install)


def check_versions(wanted: Mapping[str, SpecifierSet] | None = None) -> list[Check]:
    """All checks of versions, with what is installed here. Nothing is imported for it."""
    wanted = required() if wanted is None else wanted
    python = check_version("Python", ".".join(map(str, sys.version_info[:3])), wanted["Python"])
    there = [name for name in LIGHTNINGS if installed(name) is not None] or LIGHTNINGS[:1]
    of_both = wanted[LIGHTNINGS[0]]
    return [
        python,
        check_version("torch", installed("torch"), wanted["torch"]),
        *(check_version(name, installed(name), of_both) for name in there),
    ]
