"""Detects what a test leaves behind: processes, threads, files, shared memory, settings or a process group.

`Snapshot.take()` records the state before a test, and `find_leaks(before)` lists what exists after it and did not exist
before. Processes and threads that are about to end get a grace period, so that a test need not wait for them.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "CKPTLESS_TEST_SESSION"
REPOSITORY = Path(__file__).parent.parent
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 5.0

# tqdm keeps one thread for all bars of a process.
_THREADS_OF_OTHERS = frozenset({"TMonitor", "tqdm_monitor"})
# Set by pytest to the running test, and by torch and its libraries when they are loaded.
_VARIABLES_OF_OTHERS = frozenset(
    {
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "PYTEST_CURRENT_TEST",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TORCHINDUCTOR_CACHE_DIR",
    }
)
# Set by Lightning's `seed_everything()`: restored like other variables, but not reported.
_VARIABLES_OF_SEEDS = frozenset({"PL_GLOBAL_SEED", "PL_SEED_WORKERS"})
# Used by pytest-timeout.
_SIGNALS_OF_OTHERS = frozenset({signal.SIGALRM})
# Caches and folders that tools and developers may create while tests run.
_MAY_APPEAR = frozenset({".coverage", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"})
_FOLDERS = frozenset({"benchmarks", "configs", "docs", "examples", "site", "tests"})


@dataclass(frozen=True)
class Snapshot:
    """The resources and settings of this process at one moment, and the processes started by the test session."""

    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    files: dict[str, str]
    arenas: frozenset[str]
    variables: dict[str, str]
    handlers: dict[signal.Signals, Any]
    in_process_group: bool
    in_repository: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        """Record the current state."""
        return cls(
            frozenset(marked_processes()),
            frozenset(threading.enumerate()),
            open_files(),
            frozenset(arenas()),
            {name: value for name, value in os.environ.items() if name not in _VARIABLES_OF_OTHERS},
            {
                s: signal.getsignal(s)
                for s in signal.valid_signals() - _SIGNALS_OF_OTHERS
                if isinstance(s, signal.Signals)
            },
            process_group_exists(),
            frozenset(os.listdir(REPOSITORY)) - _MAY_APPEAR - _FOLDERS,
        )


def find_leaks(before: Snapshot) -> list[str]:
    """List what was left behind since `before`; settings are restored, and processes are killed."""
    found = [*leaked_processes(before), *leaked_threads(before), *leaked_files(before)]
    after = Snapshot.take()
    found += [f"shared memory {name}" for name in sorted(after.arenas - before.arenas)]
    found += [f"{name} in the repository" for name in sorted(after.in_repository - before.in_repository)]
    if after.in_process_group and not before.in_process_group:
        found.append("an initialized process group")
    return [*found, *changed_variables(before, after), *changed_handlers(before, after)]


def marked_processes() -> Iterator[psutil.Process]:
    """Live processes other than this one that were started by this test session, directly or not."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _mark() in _environment(entry):
            try:
                process = psutil.Process(int(entry))
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.NoSuchProcess:
                continue


def leaked_processes(before: Snapshot) -> list[str]:
    """New processes that do not end within the grace period; they are killed."""
    new = [process for process in marked_processes() if process not in before.processes]
    _, alive = psutil.wait_procs(new, timeout=GRACE_S) if new else ([], [])
    found = []
    for process in alive:
        description = f"process {process.pid}: {' '.join(_command(process))[:200]}"
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
        found.append(description)
    return found


def leaked_threads(before: Snapshot) -> list[str]:
    """New threads that do not end within the grace period."""
    new = [t for t in threading.enumerate() if t not in before.threads and t.name not in _THREADS_OF_OTHERS]
    for thread in new:
        thread.join(GRACE_S)
    return [f"thread {thread.name}" for thread in new if thread.is_alive()]


def leaked_files(before: Snapshot) -> list[str]:
    """New open file descriptors, including those of sockets and of mapped files."""
    if _new_files(before):
        gc.collect()
    return _new_files(before)


def arenas() -> Iterator[str]:
    """Arenas in the folder of this test session; those of other runs on this machine are ignored."""
    for facts in arena_folder().glob("ckptless-*/arena.json"):
        yield facts.parent.name


def arena_folder() -> Path:
    """The folder for the arenas of this test session, unless a test chooses another."""
    return SHARED_MEMORY / f"tests-{os.environ[MARK]}"


def changed_variables(before: Snapshot, after: Snapshot) -> list[str]:
    """Environment variables that differ; they are restored."""
    names = {n for n in before.variables | after.variables if before.variables.get(n) != after.variables.get(n)}
    for name in names:
        os.environ.pop(name, None)
        if name in before.variables:
            os.environ[name] = before.variables[name]
    return [f"environment variable {name}" for name in sorted(names - _VARIABLES_OF_SEEDS)]


def changed_handlers(before: Snapshot, after: Snapshot) -> list[str]:
    """Signals whose handler differs; it is restored."""
    changed = [number for number, handler in before.handlers.items() if after.handlers[number] != handler]
    for number in changed:
        signal.signal(number, before.handlers[number])
    return [f"handler of {number.name}" for number in changed]


def open_files() -> dict[str, str]:
    """The target of each file descriptor of this process, by number, without the fonts that matplotlib keeps open."""
    files = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the descriptor that listed the folder
            continue
        if "/mpl-data/fonts/" not in target:
            files[number] = target
    return files


def process_group_exists() -> bool:
    """Whether torch.distributed is loaded and has a default group."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())


def _new_files(before: Snapshot) -> list[str]:
    return [
        f"file {number} -> {target}" for number, target in open_files().items() if before.files.get(number) != target
    ]


def _mark() -> bytes:
    return f"{MARK}={os.environ[MARK]}".encode()


def _environment(pid: str) -> bytes:
    """The variables with which a process was started; waits for a child that has none yet.

    `Popen` returns when the new program has closed the descriptors that it does not inherit, which is shortly before
    the kernel has set up its variables.
    """
    until = time.monotonic() + GRACE_S
    while True:
        try:
            found = Path("/proc", pid, "environ").read_bytes()
            if found or not _is_starting(pid) or time.monotonic() > until:
                return found
        except OSError:
            return b""
        os.sched_yield()


def _is_starting(pid: str) -> bool:
    """Whether a process is a live child of this process; a zombie has no variables any more."""
    state, parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:2]
    return int(parent) == os.getpid() and state not in "ZX"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
