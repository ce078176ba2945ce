"""Checks what an agent needs from the kernel to watch its workers: pidfds and /proc."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.cli.checks.check import Check, Status

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_SCOPES = {"0": "0 (own processes)", "1": "1 (own children)", "2": "2 (administrators)", "3": "3 (none)"}
_NOTICE_S = 5.0


@dataclass(frozen=True, slots=True)
class Watched:
    """The result of watching a test process.

    Args:
        pidfd_problem: why its exit could not be observed through a pidfd; empty if it could.
        proc_problem: why its memory could not be read from /proc; empty if it could.
        ptrace_scope: setting of the kernel's Yama module; empty without it.
    """

    pidfd_problem: str = ""
    proc_problem: str = ""
    ptrace_scope: str = ""


def watch_a_process() -> Watched:
    """Start a process, observe it as an agent observes a worker, and let it exit."""
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        proc_problem = ""
        try:
            for name in ("stat", "statm"):
                Path("/proc", str(process.pid), name).read_text()
        except OSError as error:
            proc_problem = str(error)
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            pidfd_problem = f"pidfd_open: {error}"
        else:
            process.stdin.write(b"\n")
            process.stdin.flush()
            ended = select.select([pidfd], [], [], _NOTICE_S)[0]
            pidfd_problem = "" if ended else f"the exit of a process was not reported within {_NOTICE_S:g} s"
            os.close(pidfd)
    scope = _YAMA.read_text().strip() if _YAMA.exists() else ""
    return Watched(pidfd_problem, proc_problem, scope)


def check_pidfd(watched: Watched) -> Check:
    """Check that the exit of a process can be awaited through a pidfd, which process id reuse cannot confuse."""
    expected = "pidfd_open (Linux 5.3 or newer)"
    if not watched.pidfd_problem:
        return Check("pidfd", Status.OK, f"works, Linux {os.uname().release}", expected)
    fix = "use a newer kernel, or allow pidfd_open in the container's seccomp profile"
    return Check("pidfd", Status.FAILURE, watched.pidfd_problem, expected, fix)


def check_proc(watched: Watched) -> Check:
    """Check that an agent can observe how an exiting worker frees its memory; ptrace is not used."""
    expected = "readable /proc/PID/stat and statm of this user's processes; ptrace is not used"
    scope = _SCOPES.get(watched.ptrace_scope, watched.ptrace_scope)
    if not watched.proc_problem:
        found = f"readable, ptrace_scope {scope}" if scope else "readable, no ptrace_scope"
        return Check("/proc", Status.OK, found, expected)
    fix = "mount /proc in the container, with hidepid=2 at most, and run agent and workers as the same user"
    return Check("/proc", Status.FAILURE, watched.proc_problem, expected, fix)


def check_processes_of_others() -> list[Check]:
    """Run both checks on this host."""
    watched = watch_a_process()
    return [check_pidfd(watched), check_proc(watched)]
