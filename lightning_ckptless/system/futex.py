"""Waiting for a change of a word in shared memory, and waking those who wait for it; see futex(2).

The kernel compares the word with what the caller has seen before it puts the caller to sleep. So a change in between is
not missed, if whoever changes the word wakes afterwards. The word is the lower half of an aligned value of 8 bytes.

Apart from `replica/ballot_box.py`, because it calls the kernel by numbers that depend on the processor.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Mapping
from types import MappingProxyType

_SYSCALLS: Mapping[str, int] = MappingProxyType({"x86_64": 202, "aarch64": 98})
"""The number of the call by architecture. Both store the lower half of a value first."""
_NUMBER = _SYSCALLS.get(platform.machine())
_POLL_S = 0.001
"""How often a word is looked at where the number of the call is unknown."""
_WAIT, _WAKE = 0, 1
_EVERYONE = 0x7FFFFFFF
_LOWER_HALF = 0xFFFFFFFF


class _Duration(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_sleeping_call = ctypes.CDLL(None).syscall
_short_call = ctypes.PyDLL(None).syscall
"""Keeps the interpreter lock, because taking it again may last far longer than the call: 5 ms next to a busy thread."""


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleep until someone wakes those who wait at an address. May return earlier, without any reason.

    Args:
        address: address of an aligned value of 8 bytes in memory that is shared between processes.
        seen: the value, as read before. Returns at once if its lower half is no longer the same.
        timeout_s: longest wait in seconds.
    """
    if _NUMBER is None:
        time.sleep(min(timeout_s, _POLL_S))
        return
    whole_s = int(timeout_s)
    longest = _Duration(whole_s, int((timeout_s - whole_s) * 1e9))
    expected = ctypes.c_uint32(seen & _LOWER_HALF)
    _sleeping_call(_NUMBER, ctypes.c_void_p(address), _WAIT, expected, ctypes.byref(longest), None, 0)


def wake(address: int) -> None:
    """Wake all who wait at an address, in any process."""
    if _NUMBER is not None:
        _short_call(_NUMBER, ctypes.c_void_p(address), _WAKE, _EVERYONE, None, None, 0)
