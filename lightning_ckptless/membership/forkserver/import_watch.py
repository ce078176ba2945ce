"""Side effects of imports, and which module causes them.

A fork of a process that has imported modules is equivalent to a process that imports them itself only if they do not
touch what a fork does not inherit, what it would share, and what differs between workers. The successor of the fork
server imports under this watch, and so does `ckptless doctor`.

| An import that | Because |
|---|---|
| starts a thread | a fork has no such thread, but keeps the locks that it held |
| leaves a file or a connection open | all forks would share it |
| queries CUDA | a fork cannot use CUDA afterwards |
| draws random numbers, or seeds a generator | the numbers that follow would differ in a fork |
| handles a signal, changes the working directory or `sys.path` | a worker has its own |
| reads a variable that differs between workers | a fork would keep another worker's value |

Changes of the environment at import are harmless: they are known afterwards and can be repeated.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

PER_WORKER = frozenset(
    {
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"),
    }
)
"""Environment variables whose values differ between workers."""
FORK_SAFE_THREADS = frozenset({"jemalloc_bg_thd"})
"""jemalloc, a part of pyarrow, takes its locks before a fork and restarts its thread after it."""
_ENDING_S = 0.3
"""How long a joined thread may stay visible: the kernel removes it later."""


def foreign_threads() -> dict[int, str]:
    """Return the threads other than the main one, by thread id and name, without those known to be safe to fork."""
    names = {}
    for task in map(int, os.listdir("/proc/self/task")):
        if task == os.getpid():
            continue
        with suppress(FileNotFoundError), open(f"/proc/self/task/{task}/comm") as comm:
            names[task] = comm.read().strip()
    return {task: name for task, name in names.items() if name not in FORK_SAFE_THREADS}


class LeftOutError(BaseException):
    """A module is requested that must not be imported here.

    Not an `Exception`: a module that handles the failed import of another one would become a different module.
    """


@dataclass(frozen=True, slots=True)
class Started:
    """A thread that was started while modules were imported.

    Args:
        name: name of the thread.
        module: module whose code has started it.
        under_way: modules whose import was in progress, innermost last.
        request: the import request during which it was started.
    """

    name: str
    module: str
    under_way: tuple[str, ...]
    request: Hashable


class ImportWatch:
    """A context in which modules are imported, one request after the other.

    The starter of a Python thread is known exactly. A thread started by native code is noticed when the next import
    begins, and is attributed to the previous one.

    Args:
        variables: names of environment variables whose readers are noted, in addition to those that differ between
            workers.
        left_out: modules that must not be imported, with their submodules.
        pause: called before each import.
        ignored: names of modules whose code does not belong to the importing script.

    Attributes:
        readers: for each variable that was read, the modules that have read it, with the request.
        refused: modules whose import has requested one that is left out, with the latter.
    """

    def __init__(
        self,
        *,
        variables: Collection[str] = (),
        left_out: Collection[str] = (),
        pause: Callable[[], None] = lambda: None,
        ignored: Collection[str] = ("__main__",),
    ) -> None:
        self.readers: dict[str, dict[str, Hashable]] = {}
        self.refused: dict[str, str] = {}
        self._variables = PER_WORKER | frozenset(variables)
        self._left_out = frozenset(left_out)
        self._pause = pause
        self._ignored = frozenset({__name__, *ignored})
        self._request: Hashable = None
        self._importing: tuple[str, ...] = ()
        self._starters: list[tuple[threading.Thread, tuple[str, ...], Hashable]] = []
        self._seen: dict[int, tuple[tuple[str, ...], Hashable]] = dict.fromkeys(foreign_threads(), ((), None))
        self._start = threading.Thread.start
        self._before: dict[str, Any] = {}

    def __enter__(self) -> Self:
        watch, start, data = self, self._start, os.environ._data  # type: ignore[attr-defined]

        def note_and_start(thread: threading.Thread) -> None:
            watch._starters.append((thread, watch.under_way() or watch._importing, watch._request))
            start(thread)

        class Watched(dict[bytes, bytes]):
            def __getitem__(self, key: bytes) -> bytes:
                watch._note_read(os.fsdecode(key))
                return super().__getitem__(key)

        # Patched until the context is left, in this process only: Python reports thread starts only since 3.12, and
        # reads of variables never.
        threading.Thread.start = note_and_start  # type: ignore[method-assign, assignment]
        os.environ._data = Watched(data)  # type: ignore[attr-defined]
        sys.meta_path.insert(0, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._look()
        sys.meta_path.remove(self)
        os.environ._data = dict(os.environ._data)  # type: ignore[attr-defined]
        threading.Thread.start = self._start  # type: ignore[method-assign]

    # ------------------------------------------------------------------ while modules are imported

    def find_spec(self, name: str, *_: object) -> None:
        """Called by Python before it imports a module; other finders find it."""
        self._look()
        above = self.under_way()
        if part_of(name, self._left_out):
            self.refused.update(dict.fromkeys(above, name))
            raise LeftOutError(name)
        self._importing = (*above, name)
        self._pause()

    def begin(self, request: Hashable, module: str) -> None:
        """Begin a request to import a module."""
        self._look()
        self._request, self._importing = request, (module,)
        self._before = _traits()

    def effect(self) -> str:
        """Describe an effect of the request, other than threads, that a fork would lose or share."""
        changed = (
            text for name, (text, value) in _traits().items() if self._before.get(name, (text, value))[1] != value
        )
        return next(changed, "")

    def under_way(self) -> tuple[str, ...]:
        """Return the modules whose code is being executed, innermost last."""
        frame: FrameType | None = sys._getframe(1)
        names: list[str] = []
        while frame is not None:
            name = str(frame.f_globals.get("__name__", ""))
            if frame.f_code.co_name == "<module>" and name not in self._ignored:
                names.append(name)
            frame = frame.f_back
        return tuple(reversed(names))

    def _note_read(self, name: str) -> None:
        if name in self._variables:
            modules = self.under_way() or self._importing
            self.readers.setdefault(name, {}).update(dict.fromkeys(modules, self._request))

    def _look(self) -> None:
        for task in foreign_threads():
            self._seen.setdefault(task, (self._importing, self._request))

    # ------------------------------------------------------------------ afterwards

    def threads(self) -> list[Started]:
        """Return the remaining threads, with the modules that started them."""
        self._look()
        names, until = foreign_threads(), time.monotonic() + _ENDING_S
        while names and time.monotonic() < until:
            time.sleep(_ENDING_S / 100)
            names = {task: name for task, name in foreign_threads().items() if task in self._seen}
        for thread, under_way, request in self._starters:
            if thread.native_id in names:
                names[thread.native_id] = thread.name
                self._seen[thread.native_id] = (under_way, request)
        found = ((name, *self._seen[task]) for task, name in names.items())
        return [Started(name, (under_way or ("",))[-1], under_way, request) for name, under_way, request in found]


def part_of(name: str, modules: Collection[str]) -> str:
    """Return which of the given modules is a module itself or its parent package; empty if none."""
    parts = name.split(".")
    return next((part for n in range(len(parts)) if (part := ".".join(parts[: n + 1])) in modules), "")


def _traits() -> dict[str, tuple[str, Any]]:
    """Return what an import should leave unchanged, each with the message if it does not."""
    return {
        "files": ("leaves a file or a connection open", _open_files()),
        "CUDA": ("asks CUDA for its devices", _asks_cuda()),
        "signals": ("handles a signal", [signal.getsignal(number) for number in signal.valid_signals()]),
        "folder": ("changes the working directory", os.getcwd()),
        "path": ("changes sys.path", sys.path[:]),
        **{name: ("draws random numbers or seeds a generator", state) for name, state in _generators().items()},
    }


def _open_files() -> set[tuple[str, str]]:
    files = set()
    for number in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself no longer exists.
        with suppress(FileNotFoundError):
            files.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return files


def _asks_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _generators() -> dict[str, int]:
    """Return the states of the loaded generators that a script shares with its libraries."""
    states = {"random": hash(random.getstate())}
    if "numpy.random" in sys.modules:
        _, keys, *rest = sys.modules["numpy.random"].get_state()
        states["numpy"] = hash((keys.tobytes(), *rest))
    if "torch" in sys.modules:
        states["torch"] = hash(sys.modules["torch"].default_generator.get_state().numpy().tobytes())
    return states
