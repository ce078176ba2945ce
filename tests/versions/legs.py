"""What is tried: one file of requirements for each combination of versions, `requirements-LEG.txt`.

Its first line names the version of Python; the others are pins, which replace those of `constraints.txt`.
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
"""What `make test-versions` tries where no leg is named."""


@dataclass(frozen=True)
class Leg:
    """One combination of versions.

    Args:
        name: of the leg.
        python: first two numbers of its version.
        pins: versions by name of the distribution.
    """

    name: str
    python: str
    pins: dict[str, str]

    def constraints(self) -> str:
        """What pip may install: the pins of this leg, and those of `constraints.txt` for all else."""
        usual = pins_of((REPOSITORY / "constraints.txt").read_text())
        return "".join(f"{name}=={version}\n" for name, version in (usual | self.pins).items())

    def interpreter(self) -> Path | None:
        """A Python of the leg's version: of pyenv, whose shims need not be for it, or on the path."""
        name = f"python{self.python}"
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        on_path = shutil.which(name)
        return max(versions.glob(f"{self.python}.*/bin/{name}"), default=Path(on_path) if on_path else None)


def legs() -> dict[str, Leg]:
    """All combinations, by name, from the lowest version of torch to the newest."""
    found = [read(path) for path in HERE.glob("requirements-*.txt")]
    return {leg.name: leg for leg in sorted(found, key=lambda leg: numbers(leg.pins["torch"]))}


def read(path: Path) -> Leg:
    """A combination as its file has it."""
    head, pins = path.read_text().split("\n", 1)
    return Leg(path.stem.removeprefix("requirements-"), head.removeprefix("# Python "), pins_of(pins))


def pins_of(text: str) -> dict[str, str]:
    """The pinned versions in the text of a file of requirements or constraints, by name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def numbers(version: str) -> tuple[int, ...]:
    """A version for comparison."""
    return tuple(map(int, re.findall(r"\d+", version)))
