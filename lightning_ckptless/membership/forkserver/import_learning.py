"""Learning what a script imports: the successor of the fork server imports the same.

The successor is in the state of a worker at the start of the script: environment, working directory and arguments. It
imports under a watch, and slowly, because it runs during training. If a module has a side effect that forks would lack,
or cannot be imported on its own, the process is unusable and reports which modules to leave out next time.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ckptless.membership.forkserver.import_watch import (
    PER_WORKER,
    ImportWatch,
    LeftOutError,
    Started,
    part_of,
)
from lightning_ckptless.membership.forkserver.imported import Imported, changed_variables
from lightning_ckptless.membership.worker.hydra import with_folder, without_folder
from lightning_ckptless.membership.worker.startup import Job

_SHARE = 0.25
"""Largest share of a core. A lower priority is no option: workers would inherit it and could not raise it again."""
_SHORTEST_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import.

    Args:
        imported: by the script.
        job: job of the worker that has reported it.
        left_out: modules that must not be imported, with the reason.
    """

    imported: Imported
    job: Job
    left_out: dict[str, str] = field(default_factory=dict)

    def to_message(self) -> dict[str, Any]:
        """Return the request as a JSON object."""
        return {
            "imported": self.imported.to_message(),
            "job": self.job.to_message(),
            "left_out": self.left_out,
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ImportRequest:
        """Read a request that `to_message` returned."""
        return cls(Imported(**message["imported"]), Job.from_message(message["job"]), message["left_out"])


@dataclass(frozen=True, slots=True)
class ImportResult:
    """The result of a request.

    Args:
        modules: number of imported modules.
        unsafe: modules to leave out next time, with the reason; empty if the process can be forked.
        variables: what the imports have changed in the environment; None for a removed variable.
        took_s: seconds, pauses included.
    """

    modules: int
    unsafe: dict[str, str]
    variables: dict[str, str | None]
    took_s: float


def learn(request: ImportRequest, clock: Callable[[], float] = time.monotonic) -> ImportResult:
    """Import everything requested, in this process."""
    began, known = clock(), len(sys.modules)
    path = sys.path[:]
    before = _begin_as(request.job)
    sys.path[:] = request.imported.path
    variables = request.imported.variables
    unsafe: dict[str, str] = {}
    with ImportWatch(variables=variables, left_out=request.left_out, pause=_pauses(), ignored=_ours()) as watch:
        for name, file in request.imported.modules.items():
            if name not in sys.modules and not part_of(name, request.left_out):
                reason = _import(name, file, watch)
                if reason:
                    unsafe[name] = reason
        threads = watch.threads()
    changed = changed_variables(before, os.environ)
    # Workers add their script's folder themselves.
    sys.path[:] = path
    unsafe |= _starters(threads)
    unsafe |= {module: f"imports {other}" for module, other in watch.refused.items()}
    unsafe |= _readers(watch.readers, request)
    # Exclude the modules' objects from garbage collection, which would write to all pages that forks share.
    gc.collect()
    gc.freeze()
    return ImportResult(len(sys.modules) - known, _within(unsafe, request), changed, clock() - began)


def _begin_as(job: Job) -> dict[str, str]:
    """Enter the state of a worker at the start of its script; returns its environment."""
    program = with_folder(job.program, job.env)
    os.environ.clear()
    os.environ.update(without_folder(job.env))
    os.chdir(job.cwd)
    sys.argv = [program.target, *program.args]
    return dict(os.environ)


def _import(name: str, file: str, watch: ImportWatch) -> str:
    """Import one module; returns an unwanted side effect, empty if none."""
    watch.begin(name, name)
    try:
        module = importlib.import_module(name)
    except LeftOutError as error:
        return f"imports {error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module may raise anything when it is imported alone
        return f"cannot be imported alone: {type(error).__name__}: {error}"[:200]
    spec = vars(module).get("__spec__")
    found = getattr(spec, "origin", None)
    if found != file:
        return f"is found in {found} here, but in {file} by the script"
    return watch.effect()


def _starters(threads: Sequence[Started]) -> dict[str, str]:
    """Return the modules that have started threads, and those that import them."""
    unsafe: dict[str, str] = {}
    for thread in threads:
        for module in thread.under_way:
            unsafe[module] = f"imports {thread.module}"
    return unsafe | {thread.module: f"starts a thread: {thread.name}" for thread in threads}


def _readers(readers: Mapping[str, Collection[str]], request: ImportRequest) -> dict[str, str]:
    """Return the modules that have read a variable whose value in a worker is not known here."""
    unsafe: dict[str, str] = {}
    for variable, modules in readers.items():
        if variable in PER_WORKER:
            why = f"reads {variable}, which differs between workers"
        elif request.imported.variables[variable] != os.environ.get(variable):
            why = f"reads {variable}, which the script sets"
        else:
            # The imports themselves have set it.
            continue
        unsafe |= dict.fromkeys(modules, why)
    return unsafe


def _within(unsafe: dict[str, str], request: ImportRequest) -> dict[str, str]:
    return {name: reason for name, reason in unsafe.items() if name and name not in request.left_out}


_MEMBERSHIP = "lightning_ckptless.membership."


def _ours() -> frozenset[str]:
    return frozenset(
        {"__main__", __name__, *(name for name in sys.modules if name.startswith("lightning_ckptless.membership."))}
    )


def _pauses() -> Callable[[], None]:
    """Return a function that sleeps until this process has used no more than its share of a core."""
    last = [time.process_time()]

    def pause() -> None:
        used_s = time.process_time() - last[0]
        if used_s >= _SHORTEST_PAUSE_S:
            time.sleep(used_s * (1 / _SHARE - 1))
            last[0] = time.process_time()

    return pause
