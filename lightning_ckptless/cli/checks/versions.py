"""Checks the versions of Python, torch and Lightning without importing them.

Apart from the other checks, because each subject has its own file.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_ckptless.cli.checks.check import Check, Status
from lightning_ckptless.distributions import PYPI_NAMES
from lightning_ckptless.supported import SUPPORTED, Range, installed, release


def check_version(name: str, found: str | None, supported: Range) -> Check:
    """Check that a version is in the tested range; pre-releases count as the release.

    Args:
        name: name of the distribution, or `Python`.
        found: its version; None if not installed.
        supported: lowest and newest release.
    """
    lowest, newest = (".".join(map(str, numbers)) for numbers in supported)
    expected = f"{lowest} to {newest}"
    install = f"pip install '{name}>={lowest}'" if name != "Python" else f"use Python {lowest} or newer"
    if found is None:
        return Check(name, Status.FAILURE, "not installed", expected, install)
    if release(found) < supported.lowest:
        return Check(name, Status.FAILURE, found, expected, install)
    if release(found) > supported.newest:
        fix = f"run `ckptless drill` on your script to check that it recovers bit-identically, or use {name} {newest}"
        return Check(name, Status.WARNING, f"{found}, not tested", expected, fix)
    return Check(name, Status.OK, found, expected)


def check_versions(found: Mapping[str, str] | None = None) -> list[Check]:
    """Run all checks of versions.

    Args:
        found: version by name; None for the installed versions.
    """
    found = installed(["torch", *PYPI_NAMES.values()]) if found is None else found
    # One distribution of Lightning is enough.
    lightnings = [name for name in PYPI_NAMES.values() if name in found] or ["lightning"]
    return [check_version(name, found.get(name), SUPPORTED[name]) for name in ("Python", "torch", *lightnings)]
