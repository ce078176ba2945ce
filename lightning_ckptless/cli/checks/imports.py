"""Checks a script's imports (whether they work, whether they are safe to fork, import time) and its model's size."""

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
    """A thread started by an import.

    Args:
        name: name of the thread.
        module: module that started it.
        index: number of the script's import; -1 for a preloaded module.
    """

    name: str
    module: str
    index: int


@dataclass(frozen=True, slots=True)
class Effect:
    """Another side effect of an import that a fork would lose or share.

    Args:
        module: module that was imported.
        what: the effect, e.g. `changes sys.path`.
        index: number of the script's import.
    """

    module: str
    what: str
    index: int


@dataclass(frozen=True, slots=True)
class Probed:
    """The result of running a script's imports in a separate process.

    Args:
        imports: imports of the script.
        took_s: duration in seconds by number of the import, for imports that succeeded.
        own: numbers of imports of the user's own files, which every process runs itself.
        missing: error by number of the import, for imports that failed.
        threads: threads that were still running afterwards.
        effects: other side effects that a fork would lose or share.
        cuda: why a fork could not use CUDA; empty if it could.
        weight_bytes: size of the model's parameters and buffers; None if no model was requested or created.
        trained_bytes: size of the trained parameters.
        parameters: number of parameters of the model.
        models: names of classes that look like models.
        end: why the process ended early; empty if it did not.
        last: number of the import that was running then; None if none was.
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
        """Return the state of the model; None if unknown."""
        return None if self.weight_bytes is None else State(self.weight_bytes, optimizer_states * self.trained_bytes)


@dataclass(frozen=True, slots=True)
class Target:
    """A script to check.

    Args:
        path: path of its source file.
        folder: first entry of `sys.path` when it runs.
        package: package for relative imports; empty for none.
    """

    path: Path
    folder: Path
    package: str = ""

    @classmethod
    def of(cls, word: str, *, is_module: bool) -> Target:
        """Find a script named on the command line.

        Args:
            word: file, or dotted name of a module.
            is_module: whether `word` names a module, as with `python -m`.

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
            raise OptionsError(f"there is no module {word!r} in {here} or in the installed packages")
        return cls(Path(spec.origin), here, package=spec.parent or "")


def probe(target: Target, *, preload: Sequence[str], model: str = "", timeout_s: float) -> Probed:
    """Run a script's imports in a separate process.

    Args:
        target: the script.
        preload: modules that are already imported in every worker.
        model: expression that creates the model; empty for none.
        timeout_s: time limit in seconds, after which the process is killed.

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
    records = [json.loads(line) for line in lines]
    return replace(_probed(imports, records, end), models=tuple(script.models_of(tree)))


def _run(request: dict[str, Any], errors: Path, timeout_s: float) -> str:
    """Run the probe; returns why it ended early, empty if it did not."""
    # The environment of the fork server, which keeps libraries from starting threads if they support that.
    env = parent_environment(dict(os.environ))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGE_FOLDER), env.get("PYTHONPATH"))))
    # In its own process group, so that processes started by the imports are killed with it.
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
    return f"{lines[-1].strip() if lines else 'the process exited'} ({how})"


def _probed(imports: tuple[script.Import, ...], records: Sequence[dict[str, Any]], end: str) -> Probed:
    merged: dict[str, Any] = {}
    for record in records:
        merged |= record
    threads = (Thread(each["name"], each["module"], each["import"]) for each in merged.get("threads", ()))
    effects = (Effect(each["module"], each["what"], each["import"]) for each in merged.get("effects", ()))
    return Probed(
        imports,
        {record["imported"]: record["took_s"] for record in records if "imported" in record},
        frozenset(record["imported"] for record in records if not record.get("installed", True)),
        {record["missing"]: record["error"] for record in records if "missing" in record},
        tuple(threads),
        tuple(effects),
        merged.get("cuda", ""),
        merged.get("weight_bytes"),
        merged.get("trained_bytes", 0),
        merged.get("parameters", 0),
        end=end,
        last=merged.get("begun") if records and "begun" in records[-1] else None,
    )


def check_imports(probed: Probed) -> Check:
    """Check that all imports of the script work."""
    name, expected = "imports", "all imports work"
    if probed.end and probed.last is not None:
        culprit = probed.imports[probed.last]
        found = f"line {culprit.line}, `{culprit.code}`: {probed.end}"
        return Check(name, Status.FAILURE, found, expected, f"run `python -c '{culprit.code}'` to see the error")
    if probed.end and not _is_complete(probed):
        fix = "check that `python -c 'import torch, lightning.pytorch'` works"
        return Check(name, Status.FAILURE, f"before the script's imports: {probed.end}", expected, fix)
    failed = [index for index in probed.missing if not probed.imports[index].is_optional]
    if failed:
        first = probed.imports[failed[0]]
        found = f"line {first.line}, `{first.code}`: {probed.missing[failed[0]]}"
        found += f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        return Check(name, Status.FAILURE, found, expected, "install the missing packages in this environment")
    optional = [probed.imports[index].module for index in probed.missing]
    found = f"{len(probed.took_s)} of {len(probed.imports)}"
    return Check(name, Status.OK, f"{found}; without {', '.join(optional)}" if optional else found, expected)


def _is_complete(probed: Probed) -> bool:
    return len(probed.took_s) + len(probed.missing) == len(probed.imports)


def check_fork_safety(probed: Probed) -> Check:
    """Check whether the script's imports may be preloaded; see `membership.forkserver.import_watch` for the rules."""
    name = "fork safety"
    expected = "imports start no threads, do not touch CUDA or random generators, and read nothing specific to a worker"
    own_imports = "or keep it as it is: every new worker then imports the module itself, and --preload must not name it"
    if probed.threads:
        starters = sorted({thread.module for thread in probed.threads})
        found = "; ".join(_started(module, probed) for module in starters)
        fix = f"start threads in functions, {own_imports}; do not use forked dataloader workers with it"
        return Check(name, Status.WARNING, found, expected, fix)
    if probed.cuda:
        fix = f"query devices in functions, not at import time, {own_imports}"
        return Check(name, Status.WARNING, probed.cuda, expected, fix)
    if probed.effects:
        found = "; ".join(f"{each.module} {each.what}{_where(each.index, probed)}" for each in probed.effects)
        return Check(name, Status.WARNING, found, expected, f"do this in functions, {own_imports}")
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
    """Check how long a new process needs for imports: what is not preloaded is imported again at every recovery."""
    name = "import time"
    expected = f"less than {_LONG_S:g} s for imports that every new process has to make itself"
    total_s = sum(probed.took_s.values())
    unsafe = {thread.index for thread in probed.threads} | {effect.index for effect in probed.effects}
    again = [i for i in probed.took_s if probed.cuda or i in unsafe or i in probed.own]
    again_s = sum(probed.took_s[i] for i in again)
    if again_s < _LONG_S:
        rest = "" if total_s < _LONG_S else ", imported once for all later processes"
        return Check(name, Status.OK, f"{total_s:.2f} s in addition to torch and Lightning{rest}", expected)
    slow = sorted((i for i in again if probed.took_s[i] >= _NOTABLE_S), key=lambda i: -probed.took_s[i])
    found = ", ".join(f"{probed.imports[i].module} {probed.took_s[i]:.1f} s" for i in slow[:5])
    fix = "set standbys=1 to keep a process ready that has imported everything"
    return Check(name, Status.WARNING, f"{again_s:.1f} s of {total_s:.1f} s: {found}", expected, fix)


def check_model(probed: Probed, expression: str) -> Check:
    """Check whether the model could be created, and report its size.

    Args:
        probed: result of the probe.
        expression: expression that creates the model; empty if none was requested.
    """
    expected = "a LightningModule, or a function that creates one, built from the script's imports and definitions"
    if not expression:
        named = f"{', '.join(probed.models)}: not created" if probed.models else "none is defined in the script"
        return Check("model", Status.OK, f"{named}; use --model to check whether it fits", expected)
    if probed.weight_bytes is not None:
        found = f"{expression}: {probed.parameters:,} parameters, {decimal(probed.weight_bytes)} with buffers"
        return Check("model", Status.OK, found, expected)
    why = probed.end or "the script's imports did not finish"
    return Check("model", Status.FAILURE, f"{expression}: {why}", expected, "use --parameters N instead of --model")


def check_script(probed: Probed, model: str) -> list[Check]:
    """Run all checks of a script."""
    checks = [check_imports(probed)]
    if _is_complete(probed):
        checks += [check_fork_safety(probed), check_import_time(probed)]
    return [*checks, check_model(probed, model)]
