"""An empty environment that receives the wheel as a user's would, and what is tried in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.versions.legs import REPOSITORY

TELLING = (
    "tests/internals/test_names.py",
    "tests/test_supported.py",
    "tests/internals/test_torch_internals.py",
    "tests/internals/test_mesh_internals.py",
    "tests/membership/test_elastic_internals.py",
    "tests/internals/test_lightning.py",
    "tests/faults/test_kill.py::test_kill[rank=0-during=backward]",
    "tests/faults/test_kill.py::test_kill[rank=1-during=validation]",
    "tests/faults/test_kill.py::test_kill[data=persistent_workers]",
    "tests/faults/test_kill.py::test_kill_and_relaunch[rank=1-during=training_step]",
    "tests/faults/test_sharded.py::test_kill[fsdp-rank=1-during=backward-then=0-during=optimizer_step]",
    "tests/faults/test_sharded.py::test_kill[2d-rank=3-then=0]",
    "tests/faults/test_other_distribution.py",
)
"""Private names, then real kills: data parallel, worker processes of loaders, FSDP2, two dimensions, the other
distribution of Lightning alone."""
_TOOLS = ("pytest", "pytest-timeout", "packaging", "tensorboard", "torchdata", "hypothesis")
_INSTALL_S, _TRY_S = 600, 900
_NEEDED_BYTES = 12_000_000_000

HEAD = "from lightning.pytorch import seed_everything\n\nseed_everything(1)\n"
VALIDATION = """
from lightning.pytorch.demos.boring_classes import BoringModel

trainer.fit_loop.max_epochs = 1
trainer.limit_train_batches = 12
trainer.fit(BoringModel())
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Args:
        folder: of the environment.
        constraints: what pip may install.
    """

    folder: Path
    constraints: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self, interpreter: Path) -> None:
        """Make it, empty; leave it as it is where it is there."""
        if not self.python.exists():
            _run([str(interpreter), "-m", "venv", str(self.folder)], self.folder.parent, _INSTALL_S)

    def install_wheel(self, wheel: str) -> None:
        """Install the package, in the place of one that an environment which was kept has."""
        self.install(wheel)
        self.install("--force-reinstall", "--no-deps", wheel)

    def install(self, *what: str) -> None:
        """Install packages as pip resolves them within the constraints."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "--quiet"]
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / "constraints.txt"
            file.write_text(self.constraints)
            # By this variable, which takes the place of what a machine's own settings cap.
            _run([*pip, *what], self.folder, _INSTALL_S, PIP_CONSTRAINT=str(file))

    def versions(self) -> tuple[str, str, str]:
        """What is installed: Python, torch, Lightning."""
        code = """if True:
            import platform
            from importlib.metadata import version
            print(platform.python_version(), version("torch"), version("lightning"))
        """
        python, torch, lightning = _run([str(self.python), "-c", code], self.folder, _TRY_S).split()
        return python, torch.split("+")[0], lightning

    def drill_readme(self, scratch: Path) -> None:
        """Train the README's example with a kill, away from the repository, and compare with a run without one."""
        scratch.mkdir(parents=True)
        script = scratch / "example.py"
        script.write_text(readme_program())
        options = ["--nproc=4", "--launcher=python", "--fault=kill:rank=1:step=4", f"--folder={scratch / 'drill'}"]
        _run([str(self.folder / "bin" / "ckptless"), "drill", str(script), "--isolate", *options], scratch, _TRY_S)

    def test(self) -> str:
        """Run the telling tests; returns how many passed and were skipped, in pytest's words."""
        self.install(*_TOOLS)
        command = [str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", *TELLING]
        # Not the last line: libraries may write some when the interpreter ends.
        # Workers of the drills import the tests' own modules.
        output = _run(command, REPOSITORY, _TRY_S, PYTHONPATH=str(REPOSITORY))
        summaries: list[str] = re.findall(r"\d+ passed(?:, \d+ skipped)?", output)
        return summaries[-1]


def require_room(folder: Path) -> None:
    """Refuse to begin where the disk has no room for an environment.

    Raises:
        FailedError: it has not.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise FailedError(
            f"an environment takes up to {_NEEDED_BYTES / 1e9:.0f} GB, {free_bytes / 1e9:.1f} GB are free"
        )


def readme_program() -> str:
    """The README's example as a whole program of a few steps."""
    example: str = re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )[0]
    return HEAD + example + ("" if ".fit(" in example else VALIDATION)


def build_wheel(python: str, folder: Path) -> Path:
    """Build the wheel from the repository."""
    pip = [python, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", str(folder), "."]
    _run(pip, REPOSITORY, _INSTALL_S)
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    began = time.monotonic()
    print(f"  {what} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def _run(command: list[str], folder: Path, timeout_s: float, **variables: str) -> str:
    """Run a command in a clean environment; its output where it fails is the error."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CKPTLESS_", "PYTEST"))}
    shown = f"{' '.join(command[:6])} ..."
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=env | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise FailedError(f"{shown} took longer than {timeout_s:.0f} s:\n{str(expired.stdout)[-6000:]}") from expired
    if done.returncode:
        raise FailedError(f"{shown} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    output: str = done.stdout
    return output


class FailedError(Exception):
    """Something that was tried in an environment failed."""
