"""Checks of the monotonic clock, which measures intervals, and the wall clock, which is compared between processes."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

from lightning_ckptless.cli.checks.check import Check, Job, Status

_TIME_ERROR = 5
"""Return value of adjtimex(2) for an unsynchronized clock."""
_JUMP_S = 0.5
_TIMEX_LONGS = 64
"""Size of a buffer for the kernel's `struct timex`; all zeros request no change."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A point in time on both clocks, in seconds."""

    wall_s: float
    monotonic_s: float

    @classmethod
    def now(cls) -> Instant:
        """Read both clocks."""
        return cls(time.time(), time.monotonic())


def is_synchronized() -> bool | None:
    """Return whether the kernel reports a wall clock synchronized by NTP or similar; None if it does not report it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return None
    state = int(libc.adjtimex((ctypes.c_long * _TIMEX_LONGS)()))
    return None if state < 0 else state != _TIME_ERROR


def check_jumps(began: Instant, now: Instant) -> Check:
    """Check that the wall clock did not jump while the other checks ran.

    The owners of arenas are identified by their start time, with a tolerance of two seconds.
    """
    jump_s = (now.wall_s - began.wall_s) - (now.monotonic_s - began.monotonic_s)
    found = f"{jump_s:+.3f} s within {now.monotonic_s - began.monotonic_s:.1f} s"
    expected = f"the wall clock within {_JUMP_S:g} s of the monotonic one"
    if now.monotonic_s < began.monotonic_s:
        fix = "fix the clock source of the virtual machine: time limits need a clock that never goes backwards"
        return Check("clock jumps", Status.FAILURE, "the monotonic clock went backwards", expected, fix)
    if abs(jump_s) <= _JUMP_S:
        return Check("clock jumps", Status.OK, found, expected)
    fix = "slew the clock instead of stepping it (chrony, `timedatectl set-ntp true`): it identifies owners of arenas"
    return Check("clock jumps", Status.WARNING, found, expected, fix)


def check_synchronized(job: Job, synchronized: bool | None) -> Check:
    """Check that the wall clock is synchronized, which matters if times of several nodes are compared."""
    name, expected = "clock", "synchronized by NTP or similar, with several nodes"
    found = {True: "synchronized", False: "not synchronized by this kernel", None: "not reported by the kernel"}[
        synchronized
    ]
    if job.nodes == 1 or synchronized:
        return Check(name, Status.OK, found, expected)
    fix = "run chrony or systemd-timesyncd on every node: ledgers and logs of several nodes are compared by time"
    return Check(name, Status.WARNING, found, expected, fix)


def check_clock(job: Job, began: Instant) -> list[Check]:
    """Run both checks on this host."""
    return [check_jumps(began, Instant.now()), check_synchronized(job, is_synchronized())]
