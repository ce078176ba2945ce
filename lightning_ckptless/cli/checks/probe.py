"""Runs a script's imports in a separate process (`python -m`) and reports their effects.

The request is JSON on stdin; the report is a file with one JSON object per line. If a module ends this process or
hangs, it is the one whose import was begun last. The rest of the script does not run, except for its definitions if a
model is requested.

| Line | Meaning |
|---|---|
| `{"preloaded": seconds}` | the modules that are preloaded in every worker are imported |
| `{"begun": i}` | an import of the script starts |
| `{"imported": i, "took_s": seconds, "installed": true}` | it succeeded; not `installed` are the user's own files |
| `{"missing": i, "error": text}` | it failed |
| `{"threads": [{"name", "module", "import"}], "cuda": text}` | threads and CUDA state that a fork would lose |
| `{"effects": [{"module", "what", "import"}]}` | other effects that a fork would lose or share |
| `{"weight_bytes", "trained_bytes", "parameters"}` | size of the model |
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from types import ModuleType
from typing import IO, Any

from lightning_ckptless.membership.forkserver.import_watch import ImportWatch
from lightning_ckptless.membership.forkserver.imported import is_installed
from lightning_ckptless.membership.forkserver.server import loses_cuda, unsafe_to_fork

_SCRIPT = "__ckptless_doctor__"
"""`__name__` of the script's code; not `__main__`, so that its main part does not run."""


def main(request: Mapping[str, Any], report: IO[str]) -> None:
    """Run the imports and write the report.

    Args:
        request: `preload` (modules), `path` (folders), `package` (of the script, or null), `imports` (statements),
            `modules` (of each), `definitions` (code) and `model` (expression, or empty).
        report: file that receives the records, one per line.
    """

    def write(**record: Any) -> None:
        print(json.dumps(record), file=report, flush=True)

    sys.path[:0] = request["path"]
    began = time.monotonic()
    for name in request["preload"]:
        importlib.import_module(name)
    write(preloaded=time.monotonic() - began)
    namespace = sys.modules[_SCRIPT] = ModuleType(_SCRIPT)
    namespace.__package__ = request["package"]
    scope = vars(namespace)
    effects = []
    with ImportWatch(ignored=("__main__", _SCRIPT, __name__)) as watch:
        for index, (code, module) in enumerate(zip(request["imports"], request["modules"], strict=True)):
            write(begun=index)
            watch.begin(index, module)
            began = time.monotonic()
            try:
                exec(code, scope)
            except ImportError as error:
                write(missing=index, error=str(error))
            else:
                write(imported=index, took_s=time.monotonic() - began, installed=_is_installed(module))
            if what := watch.effect():
                effects.append({"module": module, "what": what, "import": index})
        threads = [{"name": found.name, "module": found.module, "import": found.request} for found in watch.threads()]
    for variable, readers in watch.readers.items():
        what = f"reads {variable}, which differs between workers"
        effects += [{"module": module, "what": what, "import": index} for module, index in readers.items()]
    write(threads=threads, effects=effects, cuda="" if threads else _cuda())
    if request["model"]:
        exec(request["definitions"], scope)
        write(**size_of(request["model"], scope))


def _is_installed(module: str) -> bool:
    return is_installed(str(getattr(sys.modules.get(module), "__file__", None) or ""))


def _cuda() -> str:
    """Return why a fork could not use CUDA; empty if it could."""
    return unsafe_to_fork() or ("an imported module has queried the CUDA devices" if loses_cuda() else "")


def size_of(expression: str, scope: dict[str, Any]) -> dict[str, int]:
    """Return the size of a model, created on the meta device without allocating its parameters.

    Args:
        expression: the model's class, a function that creates it, or a call of either.
        scope: namespace of the script.
    """
    import torch

    with torch.device("meta"):
        model = eval(expression, scope)
        if not isinstance(model, torch.nn.Module):
            model = model()
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights),
        "trained_bytes": sum(tensor.numel() * tensor.element_size() for tensor in trained),
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    with open(request["report"], "a") as report:
        main(request, report)
    # Skip the exit handlers and threads of imported modules.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
