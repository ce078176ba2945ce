"""A fork of the process that workers are forked from imports what a program imports, and takes its place.

It is as a worker is when the program begins: environment, working directory and arguments. It imports under a watch,
and slowly, for it does so beside the training. Where a module does what a fork of it would not have, or cannot be
imported alone, the process has become useless, and says which modules to leave out the next time.
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
"""Of a processor, at most. A lower priority would be inherited by the workers, which may not raise it again."""
_SHORTEST_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is to be imported.

    Args:
        imported: by the program.
        job: of the worker that has said so.
        left_out: modules that must not be imported, with the reason.
    """

    imported: Imported
    job: Job
    left_out: dict[str, str] = field(default_factory=dict)

    def to_message(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "imported": self.imported.to_message(),
            "job": self.job.to_message(),
            "left_out": self.left_out,
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Lesson:
        """The lesson that `to_message` made."""
        return cls(Imported(**message["imported"]), Job.from_message(message["job"]), message["left_out"])


@dataclass(frozen=True, slots=True)
class Learned:
    """What has come of it.

    Args:
        modules: how many were imported.
        unsafe: modules to leave out the next time, with the reason; none where the process is fit to be forked.
        variables: what the imports have changed in the environment; None for one that was removed.
        took_s: seconds, pauses included.
    """

    modules: int
    unsafe: dict[str, str]
    variables: dict[str, str | None]
    took_s: float


def learn(lesson: Lesson, clock: Callable[[], float] = time.monotonic) -> Learned:
    """Import all that is to be imported, in this process."""
    began, known = clock(), len(sys.modules)
    path = sys.path[:]
    before = _begin_as(lesson.job)
    sys.path[:] = lesson.imported.path
    variables = lesson.imported.variables
    unsafe: dict[str, str] = {}
    with ImportWatch(variables=variables, left_out=lesson.left_out, pause=_pauses(), ignored=_ours()) as watch:
        for name, file in lesson.imported.modules.items():
            if name not in sys.modules and not part_of(name, lesson.left_out):
                reason = _import(name, file, watch)
                if reason:
                    unsafe[name] = reason
        threads = watch.threads()
    changed = changed_variables(before, os.environ)
    # A worker puts its program's folder there itself.
    sys.path[:] = path
    unsafe |= _starters(threads)
    unsafe |= {module: f"imports {other}" for module, other in watch.refused.items()}
    unsafe |= _readers(watch.readers, lesson)
    # What the modules of a worker hold stays as it is: a collection would write to all pages that forks share.
    gc.collect()
    gc.freeze()
    return Learned(len(sys.modules) - known, _within(unsafe, lesson), changed, clock() - began)


def _begin_as(job: Job) -> dict[str, str]:
    """Be as a worker is when its program begins; returns its environment."""
    program = with_folder(job.program, job.env)
    os.environ.clear()
    os.environ.update(without_folder(job.env))
    os.chdir(job.cwd)
    sys.argv = [program.target, *program.args]
    return dict(os.environ)


def _import(name: str, file: str, watch: ImportWatch) -> str:
    """Import one module; returns what it has done that it should not, empty for nothing."""
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
        return f"is found in {found} here, and in {file} by the program"
    return watch.effect()


def _starters(threads: Sequence[Started]) -> dict[str, str]:
    """The modules that have started threads, and those that import them."""
    unsafe: dict[str, str] = {}
    for thread in threads:
        for module in thread.under_way:
            unsafe[module] = f"imports {thread.module}"
    return unsafe | {thread.module: f"starts a thread: {thread.name}" for thread in threads}


def _readers(readers: Mapping[str, Collection[str]], lesson: Lesson) -> dict[str, str]:
    """The modules that have read a variable whose value in a worker is not known here."""
    unsafe: dict[str, str] = {}
    for variable, modules in readers.items():
        if variable in PER_WORKER:
            why = f"reads {variable}, which differs between workers"
        elif lesson.imported.variables[variable] != os.environ.get(variable):
            why = f"reads {variable}, which the program sets"
        else:
            # The imports have set it themselves.
            continue
        unsafe |= dict.fromkeys(modules, why)
    return unsafe


def _within(unsafe: dict[str, str], lesson: Lesson) -> dict[str, str]:
    return {name: reason for name, reason in unsafe.items() if name and name not in lesson.left_out}


_MEMBERSHIP = "lightning_ckptless.membership."


def _ours() -> frozenset[str]:
    return frozenset(
        {"__main__", __name__, *(name for name in sys.modules if name.startswith("lightning_ckptless.membership."))}
    )


def _pauses() -> Callable[[], None]:
    """Sleeps, each time that it is called, until this process has used no more than its share of a processor."""
    last = [time.process_time()]

    def pause() -> None:
        used_s = time.process_time() - last[0]
        if used_s >= _SHORTEST_PAUSE_S:
            time.sleep(used_s * (1 / _SHARE - 1))
            last[0] = time.process_time()

    return pause
