"""Runs code in new interpreters that see the package as installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "lightning_ckptless"
Run = Callable[..., Any]


def install_into(site: Path) -> Path:
    """Write the metadata that pip would write for this package, and return the path for the package itself."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    info = site / f"lightning_ckptless-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site / "lightning_ckptless"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("site")
    install_into(folder).symlink_to(PACKAGE, target_is_directory=True)
    return folder


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Run:
    """Run code in a new interpreter outside of the repository, and return the value passed to `emit`."""

    def fresh(code: str, *folders: Path, **variables: str) -> Any:
        path = os.pathsep.join(str(folder) for folder in folders or (site,))
        program = f"import json\ndef emit(fact):\n    print('\\n>>>', json.dumps(fact))\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, **variables},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = [line for line in done.stdout.splitlines() if line.startswith(">>> ")]
        assert len(results) == 1, done.stdout
        return json.loads(results[0][4:])

    return fresh
