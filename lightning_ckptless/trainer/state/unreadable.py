"""Objects whose state Python gives no access to, such as a generator, so that no version can contain it.

They are named before the first version. What a script needs of them it can keep in plain values beside them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from contextvars import ContextVar
from queue import SimpleQueue
from threading import local
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from lightning_ckptless.trainer.state.plain_values import is_plain

_NEVER = (
    Generator, AsyncGenerator, Coroutine, SimpleQueue, io.StringIO, io.BytesIO, memoryview, ContextVar, local,
    WeakKeyDictionary, WeakValueDictionary, WeakSet,
)  # fmt: skip
_OF_LIBRARIES = ("builtins", "itertools", "torch", "torchdata")
"""Where iterators are from that keep their position to themselves."""


def is_unreadable(value: Any) -> bool:
    """Return whether a value has state that can neither be read nor set."""
    if isinstance(value, _NEVER):
        return True
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        is_of_library = type(value).__module__.partition(".")[0] in _OF_LIBRARIES
        return is_of_library and not is_plain(value)
    return isinstance(value, io.IOBase) and _is_written(value)


def _is_written(file: io.IOBase) -> bool:
    return file not in (sys.stdout, sys.stderr) and not file.closed and file.writable()
