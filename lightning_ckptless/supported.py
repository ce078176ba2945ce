"""The supported versions of Python, torch and Lightning, checked without importing any of them.

This package uses private names of torch and Lightning, so a version is supported only if it was tested. Older versions
are refused. Newer versions produce a warning, as they may still have all the names that are used.
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
from lightning_ckptless.distributions import PYPI_NAMES
from lightning_ckptless.errors import VersionError

Release = tuple[int, int]


class Range(NamedTuple):
    """A range of tested releases, by major and minor number; patch releases do not change what is used here.

    Args:
        lowest: lowest supported release.
        newest: newest tested release.
    """

    lowest: Release
    newest: Release


SUPPORTED = {
    "Python": Range((3, 11), (3, 13)),
    "torch": Range((2, 8), (2, 15)),
    "lightning": Range((2, 5), (2, 6)),
    "pytorch-lightning": Range((2, 5), (2, 6)),
}


class UntestedVersionWarning(UserWarning):
    """A version of Python, torch or Lightning is newer than the newest tested one."""


def check(distribution: str | None = None, env: MutableMapping[str, str] = os.environ) -> None:
    """Refuse versions that are too old and warn of untested ones, once for all processes of a run.

    Args:
        distribution: the one in use, `lightning.pytorch` or `pytorch_lightning`; None if not yet known.
        env: environment of this process.

    Raises:
        VersionError: a version is below the lowest supported one.
    """
    found = installed(["torch", *(PYPI_NAMES.values() if distribution is None else [PYPI_NAMES[distribution]])])
    used = [name for name in PYPI_NAMES.values() if name in found]
    old = too_old(found)
    # While it is not known which of the two is used, one supported distribution is enough.
    if distribution is None and set(used) - set(old):
        old = [name for name in old if name not in used]
    if old:
        raise VersionError(refusal(found, old))
    new = untested(found)
    if new and environment.UNTESTED_VERSIONS not in env and env.get("RANK", "0") == "0":
        env[environment.UNTESTED_VERSIONS] = "warned"
        warnings.warn(advice(found, new), UntestedVersionWarning, stacklevel=3)


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those distributions that are installed."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def too_old(found: Mapping[str, str]) -> list[str]:
    """Return the names of what is older than the lowest supported version."""
    return [name for name, text in found.items() if release(text) < SUPPORTED[name].lowest]


def untested(found: Mapping[str, str]) -> list[str]:
    """Return the names of what is newer than the newest tested version."""
    return [name for name, text in found.items() if release(text) > SUPPORTED[name].newest]


def release(text: str) -> Release:
    """Return major and minor number: 2.8 for `2.8.0a0+5228986c39.nv25.06`, as found in some container images."""
    first, second = re.findall(r"\d+", f"{text}.0")[:2]
    return int(first), int(second)


def refusal(found: Mapping[str, str], old: Iterable[str]) -> str:
    """Return the error message for versions that are too old, with what to install."""
    wanted = {name: f"{name} >= {_text(SUPPORTED[name].lowest)}" for name in old}
    packages = " ".join(f'"{text.replace(" ", "")}"' for name, text in wanted.items() if name != "Python")
    fix = f"pip install {packages}" if packages else "use a newer Python"
    facts = ", ".join(f"{name} {found[name]}" for name in wanted)
    return f"found {facts}, but lightning_ckptless requires {' and '.join(wanted.values())}: {fix}"


def advice(found: Mapping[str, str], new: Iterable[str]) -> str:
    """Return the warning about untested versions, with how to silence it."""
    facts = ", ".join(f"{name} {found[name]} (tested up to {_text(SUPPORTED[name].newest)})" for name in new)
    return (
        f"lightning_ckptless has not been tested with {facts}. It uses private names of torch and Lightning; missing "
        "ones are reported before training starts. Run `ckptless drill` on your script to check that it recovers "
        f"bit-identically. Set {environment.UNTESTED_VERSIONS}=1 to silence this warning"
    )


def _text(numbers: Release) -> str:
    return ".".join(map(str, numbers))
