"""Another user of the same machine, for tests of what such a user cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

UID = 65534
"""Of `nobody`, by convention."""

needs_another_user = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def run_as_another_user(imports: str, program: str, *args: str, timeout_s: float = 120) -> str:
    """Run a Python program as another user; returns what it has printed.

    Args:
        imports: what it imports, while it can still read this interpreter's files.
        program: what it does when it has become the other user.
        args: its arguments.
        timeout_s: after which it is killed.
    """
    become = f"import os\nos.setgroups([])\nos.setgid({UID})\nos.setuid({UID})\n"
    done = subprocess.run(
        [sys.executable, "-c", dedent(imports) + become + dedent(program), *args],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def call_as_another_user(function: Callable[[], object]) -> None:
    """Call a function in a child process that has become another user. It may touch files, and nothing of torch."""
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(UID)
            os.setuid(UID)
            function()
        except BaseException:  # noqa: BLE001 - the child must never return into the test runner
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def open_to_all(folder: Path) -> Path:
    """A folder in which every user may make files, as the system's temporary folder is; reachable by all."""
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder
