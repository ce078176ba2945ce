"""The tested combinations of versions, one file `requirements-LEG.txt` each.

The first line of a file has the version of Python. The others are pins, which override those in `constraints.txt`.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
USUAL = ("lowest", "middle", "newest")
"""The legs of `make test-versions` if none are given."""


@dataclass(frozen=True)
class Leg:
    """One combination of versions.

    Args:
        name: name of the leg.
        python: minor version of Python, such as 3.11.
        pins: versions by distribution.
    """

    name: str
    python: str
    pins: dict[str, str]

    def constraints(self) -> str:
        """Return the constraints for pip: the pins of this leg, and those of `constraints.txt` for everything else."""
        usual = pins_of((REPOSITORY / "constraints.txt").read_text())
        return "".join(f"{name}=={version}\n" for name, version in (usual | self.pins).items())

    def interpreter(self) -> Path | None:
        """Return a Python of the leg's version, from pyenv's versions or from PATH; None if there is none."""
        name = f"python{self.python}"
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        on_path = shutil.which(name)
        return max(versions.glob(f"{self.python}.*/bin/{name}"), default=Path(on_path) if on_path else None)


def legs() -> dict[str, Leg]:
    """Return all legs by name, from the lowest version of torch to the newest."""
    found = [read(path) for path in HERE.glob("requirements-*.txt")]
    return {leg.name: leg for leg in sorted(found, key=lambda leg: numbers(leg.pins["torch"]))}


def read(path: Path) -> Leg:
    """Read a leg from its file."""
    first, pins = path.read_text().split("\n", 1)
    return Leg(path.stem.removeprefix("requirements-"), first.removeprefix("# Python "), pins_of(pins))


def pins_of(text: str) -> dict[str, str]:
    """Return the pins in the text of a requirements or constraints file, by distribution."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def numbers(version: str) -> tuple[int, ...]:
    """Return a version as a sort key."""
    return tuple(map(int, re.findall(r"\d+", version)))
