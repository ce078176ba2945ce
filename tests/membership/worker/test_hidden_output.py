"""Output of a new process goes to a file until it has joined the other ranks, however it is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, subprocess, sys
from lightning_ckptless.membership.worker import hidden_output

env = dict(CKPTLESS_OUTPUT_FILE=sys.argv[1]) if sys.argv[1] else {}
hidden_output.hide(env, inheritable=False)
print("head of the script")
os.write(2, b"a library\\n")
subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
print(hidden_output.show(env), sorted(env))
os.write(2, b"an error\\n")
print("open files", sorted(set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2})[1:])
"""


def printed(path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=True)


def test_hidden_until_it_is_shown_again(tmp_path: Path) -> None:
    path = tmp_path / "replacements" / "rank1-2.log"
    done = printed(str(path))
    assert set(path.read_text().splitlines()) == {"head of the script", "a library", "a child"}
    assert done.stdout.splitlines() == ["True []", "open files []"]
    assert done.stderr == "an error\n"


def test_nothing_is_hidden_where_no_file_is_named(tmp_path: Path) -> None:
    done = printed("")
    assert "head of the script" in done.stdout and "False []" in done.stdout
