"""Whether the imports of a script work, what a fork would lose of them, what they take, and how large its model is."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from lightning_ckptless.cli.checks import script
from lightning_ckptless.cli.checks.check import Check, State, Status
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.forkserver.client import parent_environment

PROBE = "lightning_ckptless.cli.checks.probe"
_PACKAGE_FOLDER = Path(__file__).parents[3]
_LONG_S = 1.0
_NOTABLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread that was started by an import.

    Args:
        name: of the thread.
        module: whose code started it.
        index: number of the script's import; -1 where it was preloaded.
    """

    name: str
    module: str
    index: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What else an import has done that a fork would not have, or would share.

    Args:
        module: whose import.
        what: in words, e.g. `changes sys.path`.
        index: number of the script's import.
    """

    module: str
    what: str
    index: int


@dataclass(frozen=True, slots=True)
class Probed:
    """What was seen when a script's imports were made in a process of their own.

    Args:
        imports: of the script.
        took_s: seconds by number of the import, of those that worked.
        own: numbers of those that are the user's own files, which every process runs itself.
        missing: error by number of the import, of those that did not.
        threads: that were left.
        effects: what else was done that a fork would not have.
        cuda: what a fork could not use CUDA for; empty where it could.
        weight_bytes: of the model; None where none was asked for, or it could not be made.
        trained_bytes: of the parameters that are trained.
        parameters: of the model.
        models: names of the classes that seem to be models.
        end: why the process ended before it had answered; empty where it did not.
        last: number of the import that was under way then; None where it was none of them.
    """

    imports: tuple[script.Import, ...]
    took_s: dict[int, float] = field(default_factory=dict)
    own: frozenset[int] = frozenset()
    missing: dict[int, str] = field(default_factory=dict)
    threads: tuple[Thread, ...] = ()
    effects: tuple[Effect, ...] = ()
    cuda: str = ""
    weight_bytes: int | None = None
    trained_bytes: int = 0
    parameters: int = 0
    models: tuple[str, ...] = ()
    end: str = ""
    last: int | None = None

    def state(self, optimizer_states: int) -> State | None:
        """The state of the model; None where it is not known."""
        return None if self.weight_bytes is None else State(self.weight_bytes, optimizer_states * self.trained_bytes)


@dataclass(frozen=True, slots=True)
class Target:
    """A script as it is named on the command line.

    Args:
        path: of its text.
        folder: in which Python looks first for what it imports.
        package: that relative imports start from; empty for none.
    """

    path: Path
    folder: Path
    package: str = ""

    @classmethod
    def of(cls, word: str, *, is_module: bool) -> Target:
        """The script that a word names.

        Args:
            word: a file, or the dotted name of a module.
            is_module: whether it is the latter, as with `python -m`.

        Raises:
            OptionsError: there is no such module.
        """
        if not is_module:
            return cls(Path(word), Path(word).resolve().parent)
        here = Path.cwd()
        parts = word.split(".")
        for path in (here.joinpath(*parts).with_suffix(".py"), here.joinpath(*parts, "__main__.py")):
            if path.is_file():
                package = ".".join(parts if path.name == "__main__.py" else parts[:-1])
                return cls(path, here, package=package)
        try:
            spec = importlib.util.find_spec(word)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise OptionsError(f"there is no module {word!r} in {here} or among what is installed")
        return cls(Path(spec.origin), here, package=spec.parent or "")


def probe(target: Target, *, preload: Sequence[str], model: str = "", timeout_s: float) -> Probed:
    """Make a script's imports in a process of its own.

    Args:
        target: the script.
        preload: what every worker finds imported.
        model: an expression that makes its model; empty for none.
        timeout_s: seconds after which the process is ended.

    Raises:
        OptionsError: the script cannot be read.
    """
    tree = script.read(target.path)
    imports = tuple(script.imports_of(tree))
    with tempfile.TemporaryDirectory(prefix="ckptless-doctor-") as folder:
        request = {
            "preload": list(preload),
            "path": [str(target.folder)],
            "package": target.package or None,
            "imports": [each.code for each in imports],
            "modules": [each.module for each in imports],
            "definitions": script.definitions_of(tree) if model else "",
            "model": model,
            "report": str(Path(folder, "report")),
        }
        end = _run(request, Path(folder, "errors"), timeout_s)
        report = Path(folder, "report")
        lines = report.read_text().splitlines() if report.exists() else []
    return replace(_probed(imports, [json.loads(line) for line in lines], end), models=tuple(script.models_of(tree)))


def _run(request: dict[str, Any], errors: Path, timeout_s: float) -> str:
    """Run the probe to its end; returns why it ended early, empty if it did not."""
    # As in the process that workers are forked from: it keeps libraries from starting threads where they let it.
    env = parent_environment(dict(os.environ))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGE_FOLDER), env.get("PYTHONPATH"))))
    # A group of its own: what the imports start ends with it.
    with (
        errors.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", PROBE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=env,
            start_new_session=True,
        ) as process,
    ):
        try:
            process.communicate(json.dumps(request).encode(), timeout_s)
        except subprocess.TimeoutExpired:
            return f"not finished within {timeout_s:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return ""
    lines = errors.read_text(errors="replace").strip().splitlines()
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return f"{lines[-1].strip() if lines else 'the process ended'} ({how})"


def _probed(imports: tuple[script.Import, ...], lines: Sequence[dict[str, Any]], end: str) -> Probed:
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    threads = (Thread(each["name"], each["module"], each["import"]) for each in merged.get("threads", ()))
    effects = (Effect(each["module"], each["what"], each["import"]) for each in merged.get("effects", ()))
    return Probed(
        imports,
        {line["imported"]: line["took_s"] for line in lines if "imported" in line},
        frozenset(line["imported"] for line in lines if not line.get("installed", True)),
        {line["missing"]: line["error"] for line in lines if "missing" in line},
        tuple(threads),
        tuple(effects),
        merged.get("cuda", ""),
        merged.get("weight_bytes"),
        merged.get("trained_bytes", 0),
        merged.get("parameters", 0),
        end=end,
        last=merged.get("begun") if lines and "begun" in lines[-1] else None,
    )


def check_imports(probed: Probed) -> Check:
    """Whether everything that the script imports can be imported."""
    name, expected = "imports", "all of them work"
    if probed.end and probed.last is not None:
        culprit = probed.imports[probed.last]
        found = f"line {culprit.line}, `{culprit.code}`: {probed.end}"
        return Check(name, Status.FAILURE, found, expected, f"see what `python -c '{culprit.code}'` says")
    if probed.end and not _was_done(probed):
        fix = "see whether `python -c 'import torch, lightning.pytorch'` works"
        return Check(name, Status.FAILURE, f"before the script's imports: {probed.end}", expected, fix)
    lost = [index for index in probed.missing if not probed.imports[index].is_optional]
    if lost:
        first = probed.imports[lost[0]]
        found = f"line {first.line}, `{first.code}`: {probed.missing[lost[0]]}"
        found += f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        return Check(name, Status.FAILURE, found, expected, "install what is missing into this environment")
    optional = [probed.imports[index].module for index in probed.missing]
    found = f"{len(probed.took_s)} of {len(probed.imports)}"
    return Check(name, Status.OK, f"{found}; without {', '.join(optional)}" if optional else found, expected)


def _was_done(probed: Probed) -> bool:
    return len(probed.took_s) + len(probed.missing) == len(probed.imports)


def check_fork_safety(probed: Probed) -> Check:
    """Whether what the script imports may be preloaded: see `membership.import_watch` for what a fork would lose."""
    name = "fork safety"
    expected = "imports start no thread, leave CUDA and generators alone, and read nothing that differs between workers"
    own_imports = "each new worker imports it itself; do not give it to --preload"
    if probed.threads:
        starters = sorted({thread.module for thread in probed.threads})
        found = "; ".join(_started(module, probed) for module in starters)
        fix = f"start threads in functions, or leave it: {own_imports}, and use no forked dataloader workers beside it"
        return Check(name, Status.WARNING, found, expected, fix)
    if probed.cuda:
        fix = f"ask for devices in functions, not while modules are imported, or leave it: {own_imports}"
        return Check(name, Status.WARNING, probed.cuda, expected, fix)
    if probed.effects:
        found = "; ".join(f"{each.module} {each.what}{_where(each.index, probed)}" for each in probed.effects)
        return Check(name, Status.WARNING, found, expected, f"do so in functions, or leave it: {own_imports}")
    return Check(name, Status.OK, "nothing that a fork would lose", expected)


def _started(module: str, probed: Probed) -> str:
    threads = [thread for thread in probed.threads if thread.module == module]
    names = ", ".join(sorted({thread.name for thread in threads}))
    count = "a thread" if len(threads) == 1 else f"{len(threads)} threads"
    return f"{module} starts {count}: {names}{_where(threads[0].index, probed)}"


def _where(index: int, probed: Probed) -> str:
    if index < 0:
        return ""
    by = probed.imports[index]
    return f" (line {by.line}, `{by.code}`)"


def check_import_time(probed: Probed) -> Check:
    """Whether new processes come to `fit` soon: what is not preloaded is imported again at every recovery."""
    name = "import time"
    expected = f"less than {_LONG_S:g} s of what every new process has to import itself"
    total_s = sum(probed.took_s.values())
    unsafe = {thread.index for thread in probed.threads} | {effect.index for effect in probed.effects}
    again = [i for i in probed.took_s if probed.cuda or i in unsafe or i in probed.own]
    again_s = sum(probed.took_s[i] for i in again)
    if again_s < _LONG_S:
        rest = "" if total_s < _LONG_S else ", which are imported once for all processes that are started later"
        return Check(name, Status.OK, f"{total_s:.2f} s beside torch and Lightning{rest}", expected)
    slow = sorted((i for i in again if probed.took_s[i] >= _NOTABLE_S), key=lambda i: -probed.took_s[i])
    found = ", ".join(f"{probed.imports[i].module} {probed.took_s[i]:.1f} s" for i in slow[:5])
    fix = "keep a process that has imported everything: standbys=1"
    return Check(name, Status.WARNING, f"{again_s:.1f} s of {total_s:.1f} s: {found}", expected, fix)


def check_model(probed: Probed, expression: str) -> Check:
    """Whether the model could be made, and how large it is.

    Args:
        probed: what was seen.
        expression: that makes it; empty where it was not to be made.
    """
    expected = "a LightningModule, or what makes one, from the script's imports, definitions and constants"
    if not expression:
        named = f"{', '.join(probed.models)}: not made" if probed.models else "none is defined in the script"
        return Check("model", Status.OK, f"{named}; --model has its size compared with the room", expected)
    if probed.weight_bytes is not None:
        found = f"{expression}: {probed.parameters:,} parameters, {decimal(probed.weight_bytes)} with buffers"
        return Check("model", Status.OK, found, expected)
    why = probed.end or "the script's imports did not come to their end"
    return Check("model", Status.FAILURE, f"{expression}: {why}", expected, "give --parameters N instead of --model")


def check_script(probed: Probed, model: str) -> list[Check]:
    """All checks of a script."""
    checks = [check_imports(probed)]
    if _was_done(probed):
        checks += [check_fork_safety(probed), check_import_time(probed)]
    return [*checks, check_model(probed, model)]
