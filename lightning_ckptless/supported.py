"""The versions of Python, torch and Lightning that this package works with, checked without importing any of them.

Private names of torch and Lightning are used, so a version is supported when it was tested. An older one is refused; a
newer one is tried, after a warning: it may have all names where they were.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from lightning_ckptless import environment
from lightning_ckptless.errors import VersionError

Release = tuple[int, int]


class Range(NamedTuple):
    """Releases that were tested, by their first two numbers: a third one changes nothing that is used here.

    Args:
        lowest: that is supported.
        newest: that was tested.
    """

    lowest: Release
    newest: Release


SUPPORTED = {
    "Python": Range((3, 11), (3, 13)),
    "torch": Range((2, 8), (2, 15)),
    "lightning": Range((2, 5), (2, 6)),
    "pytorch-lightning": Range((2, 5), (2, 6)),
}
LIGHTNING = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
"""By module: the distribution that it is installed by."""


class UntestedVersionWarning(UserWarning):
    """A version of Python, torch or Lightning is newer than those that this package was tested with."""


def check(distribution: str | None = None, env: MutableMapping[str, str] = os.environ) -> None:
    """Refuse versions that are too old, and warn of untested ones, once for all processes of a run.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`: which one is used; None where that is not known yet.
        env: of this process.

    Raises:
        VersionError: a version is below the lowest supported one.
    """
    found = installed(["torch", *(LIGHTNING.values() if distribution is None else [LIGHTNING[distribution]])])
    used = [name for name in LIGHTNING.values() if name in found]
    old = too_old(found)
    # Before it is known which of the two is used, one that will do is enough.
    if distribution is None and set(used) - set(old):
        old = [name for name in old if name not in used]
    if old:
        raise VersionError(refusal(found, old))
    new = untested(found)
    if new and environment.UNTESTED_VERSIONS not in env and env.get("RANK", "0") == "0":
        env[environment.UNTESTED_VERSIONS] = "warned"
        warnings.warn(advice(found, new), UntestedVersionWarning, stacklevel=3)


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those distributions that are installed."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def too_old(found: Mapping[str, str]) -> list[str]:
    """What is older than the lowest supported version."""
    return [name for name, text in found.items() if release(text) < SUPPORTED[name].lowest]


def untested(found: Mapping[str, str]) -> list[str]:
    """What is newer than the newest version that was tested."""
    return [name for name, text in found.items() if release(text) > SUPPORTED[name].newest]


def release(text: str) -> Release:
    """The first two numbers of a version: `2.8.0a0+5228986c39.nv25.06`, as in some container images, is 2.8."""
    first, second = re.findall(r"\d+", f"{text}.0")[:2]
    return int(first), int(second)


def refusal(found: Mapping[str, str], old: Iterable[str]) -> str:
    """Why nothing can be trained with versions that are too old, and what to install."""
    wanted = {name: f"{name} >= {_text(SUPPORTED[name].lowest)}" for name in old}
    packages = " ".join(f'"{text.replace(" ", "")}"' for name, text in wanted.items() if name != "Python")
    fix = f"pip install {packages}" if packages else "use a newer Python"
    facts = ", ".join(f"{name} {found[name]} is installed" for name in wanted)
    return f"{facts}, but lightning_ckptless needs {' and '.join(wanted.values())}: {fix}"


def advice(found: Mapping[str, str], new: Iterable[str]) -> str:
    """What an untested version means, and how to hear no more of it."""
    facts = ", ".join(f"{name} {found[name]} (tested: up to {_text(SUPPORTED[name].newest)})" for name in new)
    return (
        f"lightning_ckptless has not been tested with {facts}. It uses private names of torch and Lightning: those "
        "that have moved are reported before training starts. Run `ckptless drill` on your program to see whether it "
        f"recovers exactly. {environment.UNTESTED_VERSIONS}=1 silences this warning"
    )


def _text(numbers: Release) -> str:
    return ".".join(map(str, numbers))
