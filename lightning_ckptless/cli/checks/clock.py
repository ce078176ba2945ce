"""The clocks: the one that intervals are measured by, and the one by which processes and machines compare instants."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

from lightning_ckptless.cli.checks.check import Check, Job, Status

_TIME_ERROR = 5
"""What adjtimex(2) answers where nothing keeps the clock in step."""
_JUMP_S = 0.5
_TIMEX_LONGS = 64
"""Room for the structure that the kernel fills in: all zeros ask for nothing to be changed."""


@dataclass(frozen=True, slots=True)
class Instant:
    """The same moment on both clocks, in seconds."""

    wall_s: float
    monotonic_s: float

    @classmethod
    def now(cls) -> Instant:
        """This moment."""
        return cls(time.time(), time.monotonic())


def is_synchronised() -> bool | None:
    """Whether the kernel says that the wall clock is kept in step by NTP or the like; None where it does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return None
    state = int(libc.adjtimex((ctypes.c_long * _TIMEX_LONGS)()))
    return None if state < 0 else state != _TIME_ERROR


def check_jumps(began: Instant, now: Instant) -> Check:
    """Whether the wall clock has kept up with the monotonic one while the other checks ran.

    Processes that own shared memory are identified by when they started, with a tolerance of two seconds.
    """
    jump_s = (now.wall_s - began.wall_s) - (now.monotonic_s - began.monotonic_s)
    found = f"{jump_s:+.3f} s within {now.monotonic_s - began.monotonic_s:.1f} s"
    expected = f"the wall clock within {_JUMP_S:g} s of the monotonic one"
    if now.monotonic_s < began.monotonic_s:
        fix = "repair the virtual machine's clock source: time limits need a clock that never steps back"
        return Check("clock jumps", Status.FAILURE, "the monotonic clock stepped back", expected, fix)
    if abs(jump_s) <= _JUMP_S:
        return Check("clock jumps", Status.OK, found, expected)
    fix = "have the clock slewed and not stepped (chrony, `timedatectl set-ntp true`): owners of arenas are known by it"
    return Check("clock jumps", Status.WARNING, found, expected, fix)


def check_synchronised(job: Job, synchronised: bool | None) -> Check:
    """Whether the wall clock is kept in step, which matters where the times of several machines are compared."""
    name, expected = "clock", "kept in step by NTP or the like, where there are several machines"
    found = {True: "kept in step", False: "not kept in step by this kernel", None: "the kernel does not say"}[
        synchronised
    ]
    if job.nodes == 1 or synchronised:
        return Check(name, Status.OK, found, expected)
    fix = "run chrony or systemd-timesyncd on every machine: instants in ledgers and log lines of machines are compared"
    return Check(name, Status.WARNING, found, expected, fix)


def check_clock(job: Job, began: Instant) -> list[Check]:
    """Both checks, with what is found here."""
    return [check_jumps(began, Instant.now()), check_synchronised(job, is_synchronised())]
