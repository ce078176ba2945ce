"""Imports what a script imports, in a process of its own, and reports what that does: `python -m` with a request.

The request is JSON on stdin, the report JSON, one object per line. A module that ends this process, or hangs, is the
one that was begun last. The rest of the script does not run, but for definitions where a model is asked for.

| Line | Means |
|---|---|
| `{"preloaded": seconds}` | what every worker finds imported is imported |
| `{"begun": i}` | an import of the script begins |
| `{"imported": i, "took_s": seconds, "installed": true}` | it has worked; whether the module is no file of the user's |
| `{"missing": i, "error": text}` | it has not |
| `{"threads": [{"name", "module", "import"}], "cuda": text}` | what would be lost in a fork, and who has begun it |
| `{"effects": [{"module", "what", "import"}]}` | what else a fork would not have or would share |
| `{"weight_bytes", "trained_bytes", "parameters"}` | the model |
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
"""What `__name__` is in the script's code: not that of the main program, whose part is not run."""


def main(request: Mapping[str, Any], report: IO[str]) -> None:
    """Answer a request.

    Args:
        request: `preload` (modules), `path` (folders), `package` (of the script, or null), `imports` (statements),
            `modules` (of each), `definitions` (code) and `model` (expression, or empty).
        report: receives the lines.
    """

    def say(**line: Any) -> None:
        print(json.dumps(line), file=report, flush=True)

    sys.path[:0] = request["path"]
    began = time.monotonic()
    for name in request["preload"]:
        importlib.import_module(name)
    say(preloaded=time.monotonic() - began)
    stand_in = sys.modules[_SCRIPT] = ModuleType(_SCRIPT)
    stand_in.__package__ = request["package"]
    scope = vars(stand_in)
    effects = []
    with ImportWatch(ignored=("__main__", _SCRIPT, __name__)) as watch:
        for index, (code, module) in enumerate(zip(request["imports"], request["modules"], strict=True)):
            say(begun=index)
            watch.begin(index, module)
            began = time.monotonic()
            try:
                exec(code, scope)
            except ImportError as error:
                say(missing=index, error=str(error))
            else:
                say(imported=index, took_s=time.monotonic() - began, installed=_is_installed(module))
            if what := watch.effect():
                effects.append({"module": module, "what": what, "import": index})
        threads = [{"name": found.name, "module": found.module, "import": found.request} for found in watch.threads()]
    for variable, readers in watch.readers.items():
        what = f"reads {variable}, which differs between workers"
        effects += [{"module": module, "what": what, "import": index} for module, index in readers.items()]
    say(threads=threads, effects=effects, cuda="" if threads else _cuda())
    if request["model"]:
        exec(request["definitions"], scope)
        say(**size_of(request["model"], scope))


def _is_installed(module: str) -> bool:
    return is_installed(str(getattr(sys.modules.get(module), "__file__", None) or ""))


def _cuda() -> str:
    """What a fork could not use CUDA for; empty where it could."""
    return unsafe_to_fork() or ("an imported module has asked CUDA for its devices" if loses_cuda() else "")


def size_of(expression: str, scope: dict[str, Any]) -> dict[str, int]:
    """How large a model is, built without memory for its parameters.

    Args:
        expression: its class, a function that makes it, or a call of one of them.
        scope: names of the script.
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
    asked = json.load(sys.stdin)
    with open(asked["report"], "a") as lines:
        main(asked, lines)
    # Threads and exit handlers of what was imported are no concern any more.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
