"""The output of a replacement, kept in a file until it has caught up with the other ranks.

A replacement runs the script from its beginning. What the script prints there, such as the seed, the devices and the
model summary, was shown when the run began. The file is shown if the process fails before it joins.

This is a separate file because the fork of a worker hides its output and the trainer, in another package, restores it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping

from lightning_ckptless import environment

_STDOUT, _STDERR = 1, 2


def hide(env: MutableMapping[str, str], *, inheritable: bool) -> None:
    """Redirect stdout and stderr of this process to the file that its environment names, if it names one.

    Args:
        env: environment of the worker; receives the file descriptors of the real streams.
        inheritable: whether the worker executes another program, which needs the descriptors as well.
    """
    path = env.get(environment.OUTPUT_FILE)
    if not path:
        return
    real = [os.dup(number) for number in (_STDOUT, _STDERR)]
    for number in real:
        os.set_inheritable(number, inheritable)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    for number in (_STDOUT, _STDERR):
        os.dup2(file, number)
    os.close(file)
    env[environment.HIDDEN_STREAMS] = ",".join(map(str, real))


def show(env: MutableMapping[str, str] = os.environ) -> bool:
    """Restore this process's real stdout and stderr. Returns whether they were hidden."""
    hidden = env.pop(environment.HIDDEN_STREAMS, "")
    env.pop(environment.OUTPUT_FILE, None)
    if not hidden:
        return False
    sys.stdout.flush()
    sys.stderr.flush()
    for number, real in zip((_STDOUT, _STDERR), map(int, hidden.split(",")), strict=True):
        os.dup2(real, number)
        os.close(real)
    return True


def real_stderr(env: Mapping[str, str] = os.environ) -> int:
    """Return the file descriptor of this process's real stderr, hidden or not."""
    hidden = env.get(environment.HIDDEN_STREAMS, "")
    return int(hidden.split(",")[1]) if hidden else _STDERR
