"""The user's script, and how Python runs it as `__main__`."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Literal

from lightning_ckptless.errors import LaunchError

Kind = Literal["script", "module", "executable", "call"]


@dataclass(frozen=True, slots=True)
class Program:
    """What every worker runs.

    Args:
        kind: `script` for a file, folder or zip that Python runs, `module` for `python -m`, `executable` for anything
        else that the system can start, `call` for a call held by a forked parent (`forked_call.py`).
        target: the file, the dotted name of the module, or the name of the call in messages.
        args: what follows it on the command line.
        flags: options of the interpreter, e.g. `("-X", "dev")`.
    """

    kind: Kind
    target: str
    args: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Return the command line of a new, unbuffered process that runs it."""
        if self.kind == "executable":
            return [self.target, *self.args]
        python = [sys.executable, *self.flags]
        if "-u" not in self.flags:
            python.append("-u")
        return [*python, *(["-m"] if self.kind == "module" else []), self.target, *self.args]

    def __str__(self) -> str:
        return f"-m {self.target}" if self.kind == "module" else self.target


def run_as_main(program: Program) -> None:
    """Run a Python script in this process as its `__main__`, which stays in place afterwards.

    Sets `sys.argv`, `sys.orig_argv` and the first entry of `sys.path` as Python does at its start. Exceptions of the
    script propagate.
    """
    main = ModuleType("__main__")
    # Python's own `__main__` has the builtins as a module; a new module would have a copy of their dict.
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [program.target, *program.args]
    sys.orig_argv = program.command()
    prepare = _prepare_module if program.kind == "module" else _prepare_script
    exec(prepare(program, main), main.__dict__)


def _prepare_script(program: Program, main: ModuleType) -> CodeType:
    path = os.path.join(os.getcwd(), program.target)  # Not normalized, as in Python.
    if pkgutil.get_importer(path) is not None:
        return _prepare_container(path, main)
    _put_first(os.path.dirname(os.path.realpath(path)))
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader, __spec__=None, __package__=None)
    try:
        with io.open_code(path) as file:
            return compile(file.read(), path, "exec")
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        raise SystemExit(2) from None


def _prepare_container(path: str, main: ModuleType) -> CodeType:
    """A folder or a zip with a `__main__.py`: it becomes the first entry of the search path."""
    sys.path.insert(0, path)
    importer: Any = pkgutil.get_importer(path)
    spec = None if importer is None else importer.find_spec("__main__")
    if spec is None:
        sys.stderr.write(f"{sys.executable}: can't find '__main__' module in {path!r}\n")
        raise SystemExit(1)
    return _adopt(spec, main)


def _prepare_module(program: Program, main: ModuleType) -> CodeType:
    _put_first(os.getcwd())
    try:
        spec = importlib.util.find_spec(program.target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{program.target}.__main__")
    except ModuleNotFoundError as error:
        if not _names_part_of(error.name, program.target):
            raise
        spec = None
    if spec is None:
        sys.stderr.write(f"{sys.executable}: No module named {program.target}\n")
        raise SystemExit(1)
    code = _adopt(spec, main)
    sys.argv[0] = spec.origin or program.target
    return code


def _names_part_of(missing: str | None, target: str) -> bool:
    return missing is not None and f"{target}.__main__.".startswith(f"{missing}.")


def _adopt(spec: ModuleSpec, main: ModuleType) -> CodeType:
    """Give `__main__` the attributes of a module found by the import system, and return its code."""
    loader: Any = spec.loader
    code = None if loader is None or not hasattr(loader, "get_code") else loader.get_code(spec.name)
    if code is None:
        raise LaunchError(f"{spec.name} cannot be run: its loader has no code")
    main.__dict__.update(
        __file__=spec.origin, __cached__=spec.cached, __loader__=loader, __spec__=spec, __package__=spec.parent
    )
    assert isinstance(code, CodeType)
    return code


def _put_first(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def script_path(program: Program, cwd: str) -> Sequence[str]:
    """Return the folder that Python searches first for a script's imports: its own, or the working directory."""
    if program.kind == "script":
        return [os.path.dirname(os.path.realpath(os.path.join(cwd, program.target)))]
    return [cwd]
