"""Versions of Python, torch and Lightning, against those that are supported. None of them is imported for that.

Short, and used by the doctor alone: every subject of its checks has a file of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_ckptless.cli.checks.check import Check, Status
from lightning_ckptless.supported import LIGHTNING, SUPPORTED, Range, installed, release


def check_version(name: str, found: str | None, supported: Range) -> Check:
    """Whether a version is in the range that was tested; a build that precedes a release counts as that release.

    Args:
        name: of the distribution, or `Python`.
        found: its version; None where it is not installed.
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
        fix = f"run `ckptless drill` on the program to see whether it recovers exactly, or install {name} {newest}"
        return Check(name, Status.WARNING, f"{found}, which was not tested", expected, fix)
    return Check(name, Status.OK, found, expected)


def check_versions(found: Mapping[str, str] | None = None) -> list[Check]:
    """All checks of versions.

    Args:
        found: version by name; None for what is installed here.
    """
    found = installed(["torch", *LIGHTNING.values()]) if found is None else found
    # Either distribution of Lightning is enough.
    lightnings = [name for name in LIGHTNING.values() if name in found] or ["lightning"]
    return [check_version(name, found.get(name), SUPPORTED[name]) for name in ("Python", "torch", *lightnings)]
