"""What a test may not leave behind, and how it is found.

`Scene.now()` notes what is there before a test; `leaks(before)` names what is there after it and was not before. What
is on its way out (a process that was killed, a thread that was told to end) gets a grace period, so that a test need
not wait for it.
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

# tqdm keeps one for all bars of a process.
_THREADS_OF_OTHERS = frozenset({"TMonitor", "tqdm_monitor"})
# pytest notes there which test is running; torch's libraries and Lightning's how they are loaded.
_VARIABLES_OF_OTHERS = frozenset(
    {
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "PYTEST_CURRENT_TEST",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TORCHINDUCTOR_CACHE_DIR",
    }
)
# Lightning's notes of seed_everything(): put back, as all that changes, but nobody's fault.
_VARIABLES_OF_SEEDS = frozenset({"PL_GLOBAL_SEED", "PL_SEED_WORKERS"})
# pytest-timeout's.
_SIGNALS_OF_OTHERS = frozenset({signal.SIGALRM})
# Caches, and what people and their tools make while tests run.
_MAY_APPEAR = frozenset({".coverage", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"})
_ROOMS = frozenset({"benchmarks", "configs", "docs", "examples", "site", "tests"})


@dataclass(frozen=True)
class Scene:
    """What a process holds and has caused at one moment."""

    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    files: dict[str, str]
    arenas: frozenset[str]
    variables: dict[str, str]
    handlers: dict[signal.Signals, Any]
    in_process_group: bool
    in_repository: frozenset[str]

    @classmethod
    def now(cls) -> Scene:
        """Look at everything."""
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
            frozenset(os.listdir(REPOSITORY)) - _MAY_APPEAR - _ROOMS,
        )


def leaks(before: Scene) -> list[str]:
    """Name what was left behind since `before`; settings are put back, processes are killed."""
    found = [*leaked_processes(before), *leaked_threads(before), *leaked_files(before)]
    after = Scene.now()
    found += [f"shared memory {name}" for name in sorted(after.arenas - before.arenas)]
    found += [f"{name} in the repository" for name in sorted(after.in_repository - before.in_repository)]
    if after.in_process_group and not before.in_process_group:
        found.append("an initialised process group")
    return [*found, *changed_variables(before, after), *changed_handlers(before, after)]


def marked_processes() -> Iterator[psutil.Process]:
    """Live processes, other than this one, that were started under this test session, by whomever."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _mark() in _environment(entry):
            try:
                process = psutil.Process(int(entry))
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.NoSuchProcess:
                continue


def leaked_processes(before: Scene) -> list[str]:
    """Processes that are new and do not end within the grace period; they are killed."""
    new = [process for process in marked_processes() if process not in before.processes]
    _, alive = psutil.wait_procs(new, timeout=GRACE_S) if new else ([], [])
    found = []
    for process in alive:
        with_command = f"process {process.pid}: {' '.join(_command(process))[:200]}"
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
        found.append(with_command)
    return found


def leaked_threads(before: Scene) -> list[str]:
    """Threads that are new and do not end within the grace period."""
    new = [t for t in threading.enumerate() if t not in before.threads and t.name not in _THREADS_OF_OTHERS]
    for thread in new:
        thread.join(GRACE_S)
    return [f"thread {thread.name}" for thread in new if thread.is_alive()]


def leaked_files(before: Scene) -> list[str]:
    """File descriptors, sockets and mappings' files that are new and open."""
    if _new_files(before):
        gc.collect()
    return _new_files(before)


def arenas() -> Iterator[str]:
    """Arenas in the folder that is this session's own: what other runs on this machine do is none of its business."""
    for facts in arena_folder().glob("ckptless-*/arena.json"):
        yield facts.parent.name


def arena_folder() -> Path:
    """Where all arenas go that are made under this test session, unless a test says otherwise."""
    return SHARED_MEMORY / f"tests-{os.environ[MARK]}"


def changed_variables(before: Scene, after: Scene) -> list[str]:
    """Environment variables that differ; they are put back."""
    names = {n for n in before.variables | after.variables if before.variables.get(n) != after.variables.get(n)}
    for name in names:
        os.environ.pop(name, None)
        if name in before.variables:
            os.environ[name] = before.variables[name]
    return [f"environment variable {name}" for name in sorted(names - _VARIABLES_OF_SEEDS)]


def changed_handlers(before: Scene, after: Scene) -> list[str]:
    """Signals whose handler differs; it is put back."""
    changed = [number for number, handler in before.handlers.items() if after.handlers[number] != handler]
    for number in changed:
        signal.signal(number, before.handlers[number])
    return [f"handler of {number.name}" for number in changed]


def open_files() -> dict[str, str]:
    """File descriptors of this process, by number, with what they point to."""
    files = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            files[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that listed the folder
            continue
    return files


def process_group_exists() -> bool:
    """Whether torch.distributed is loaded and its default group is there."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())


def _new_files(before: Scene) -> list[str]:
    return [
        f"file {number} -> {target}" for number, target in open_files().items() if before.files.get(number) != target
    ]


def _mark() -> bytes:
    return f"{MARK}={os.environ[MARK]}".encode()


def _environment(pid: str) -> bytes:
    """The variables that a process was started with; waits for a child that has none yet.

    `Popen` returns once the new program has closed what it does not inherit, a moment before the kernel has set up its
    variables.
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
    """Whether it is a live child of this process; a zombie has no variables any more."""
    state, parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:2]
    return int(parent) == os.getpid() and state not in "ZX"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
