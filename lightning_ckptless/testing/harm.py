"""What a fault does to the process it strikes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from lightning_ckptless import environment
from lightning_ckptless.protocol.fault_script import Fault

EXIT_CODE = 3
"""With which an `exit` fault leaves."""


class InjectedError(RuntimeError):
    """Raised by a `raise` fault."""


def do_harm(fault: Fault, step: int) -> NoReturn:
    """Let a fault happen to this process.

    Args:
        fault: what is to happen.
        step: optimizer step at which it does.

    Raises:
        InjectedError: the fault is of the kind `raise`.
    """
    if fault.kind == "raise":
        raise InjectedError(f"injected at step {step}: {fault}")
    sys.stdout.flush()
    sys.stderr.flush()
    if fault.kind == "exit":
        os._exit(EXIT_CODE)
    if fault.kind == "leave":
        os._exit(0)
    if fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "node":
        lose_node()
    while True:
        # Nothing sets it: waits without using the processor, as a rank that is stuck in a driver does.
        threading.Event().wait()


def lose_node() -> None:
    """Take this node from the run: its agent ends by SIGKILL, and its workers with it."""
    agent = int(os.environ.get(environment.AGENT, os.getppid()))
    os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
