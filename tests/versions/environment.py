"""A virtual environment with the wheel installed as by a user, and the checks that run in it."""

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

SELECTED_TESTS = (
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
"""Private names, then real kills: data parallelism, dataloader workers, FSDP2, a 2D mesh, the other distribution of
Lightning."""
_TOOLS = ("pytest", "pytest-timeout", "packaging", "tensorboard", "torchdata", "hypothesis")
_INSTALL_S, _RUN_S = 600, 900
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
        folder: folder of the environment.
        constraints: constraints for pip.
    """

    folder: Path
    constraints: str

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.folder / "bin" / "python"

    def make(self, interpreter: Path) -> None:
        """Create the environment if it does not exist."""
        if not self.python.exists():
            _run([str(interpreter), "-m", "venv", str(self.folder)], self.folder.parent, _INSTALL_S)

    def install_wheel(self, wheel: str) -> None:
        """Install the wheel; replace an older one in a kept environment."""
        self.install(wheel)
        self.install("--force-reinstall", "--no-deps", wheel)

    def install(self, *what: str) -> None:
        """Install packages, resolved by pip within the constraints."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "--quiet"]
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / "constraints.txt"
            file.write_text(self.constraints)
            # The variable overrides constraints in the settings of this machine.
            _run([*pip, *what], self.folder, _INSTALL_S, PIP_CONSTRAINT=str(file))

    def versions(self) -> tuple[str, str, str]:
        """Return the installed versions of Python, torch and Lightning."""
        code = """if True:
            import platform
            from importlib.metadata import version
            print(platform.python_version(), version("torch"), version("lightning"))
        """
        python, torch, lightning = _run([str(self.python), "-c", code], self.folder, _RUN_S).split()
        return python, torch.split("+")[0], lightning

    def drill_readme(self, scratch: Path) -> None:
        """Run a drill with a kill on the README's example, outside of the repository."""
        scratch.mkdir(parents=True)
        script = scratch / "example.py"
        script.write_text(readme_program())
        options = ["--nproc=4", "--launcher=python", "--fault=kill:rank=1:step=4", f"--folder={scratch / 'drill'}"]
        _run([str(self.folder / "bin" / "ckptless"), "drill", str(script), "--isolate", *options], scratch, _RUN_S)

    def test(self) -> str:
        """Run the selected tests and return pytest's counts of passed and skipped tests."""
        self.install(*_TOOLS)
        command = [str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", *SELECTED_TESTS]
        # The workers of the drills import modules of the tests.
        output = _run(command, REPOSITORY, _RUN_S, PYTHONPATH=str(REPOSITORY))
        # The summary need not be the last line, because libraries may print at exit.
        summaries: list[str] = re.findall(r"\d+ passed(?:, \d+ skipped)?", output)
        return summaries[-1]


def require_disk_space(folder: Path) -> None:
    """Check that the disk has space for an environment.

    Raises:
        FailedError: it has too little.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise FailedError(
            f"an environment takes up to {_NEEDED_BYTES / 1e9:.0f} GB, but only {free_bytes / 1e9:.1f} GB are free"
        )


def readme_program() -> str:
    """Return the README's example as a complete script of a few steps."""
    example: str = re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )[0]
    return HEAD + example + ("" if ".fit(" in example else VALIDATION)


def build_wheel(python: str, folder: Path) -> Path:
    """Build the wheel of the repository."""
    pip = [python, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", str(folder), "."]
    _run(pip, REPOSITORY, _INSTALL_S)
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print an activity and how long it took."""
    started_at = time.monotonic()
    print(f"  {what} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - started_at:.0f} s", flush=True)


def _run(command: list[str], folder: Path, timeout_s: float, **variables: str) -> str:
    """Run a command without PYTHON*, CKPTLESS_* and PYTEST* variables; if it fails, raise its output."""
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
        raise FailedError(f"{shown} failed with exit code {done.returncode}:\n{done.stdout[-6000:]}")
    output: str = done.stdout
    return output


class FailedError(Exception):
    """A command in an environment failed."""
