"""Imports what a script imports, in a process of its own, and reports what that does: `python -m` with a request.

The request is JSON on stdin, the report JSON, one object per line. A module that ends this process, or hangs, is the
one that was begun last. The rest of the script does not run, but for definitions where a model is asked for.

| Line | Means |
|---|---|
| `{"preloaded": seconds}` | what every worker finds imported is imported |
| `{"begun": i}` | an import of the script begins |
| `{"imported": i, "took_s": seconds}` or `{"missing": i, "error": text}` | it has worked, or not |
| `{"threads": [{"name", "module", "import"}], "cuda": text}` | what would be lost in a fork, and who has begun it |
| `{"weight_bytes", "trained_bytes", "parameters"}` | the model |
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType, ModuleType
from typing import IO, Any

from lightning_ckptless.membership.forkserver.server import foreign_threads, loses_cuda, unsafe_to_fork

_SCRIPT = "__ckptless_doctor__"
"""What `__name__` is in the script's code: not that of the main program, whose part is not run."""
_ENDING_S = 0.3
"""How long a thread may still be seen that has been joined: the kernel ends it later."""


class ThreadWatch:
    """Notes which module was being imported when a thread appeared.

    Who starts a thread of Python's is known exactly. One that other code starts is seen when the next import begins,
    and is attributed to the one before.

    Attributes:
        index: number of the script's import that is under way; -1 before the first.
    """

    def __init__(self) -> None:
        self.index = -1
        self._importing = "what is preloaded"
        self._starters: list[tuple[threading.Thread, str, int]] = []
        self._blamed: dict[int, tuple[str, int]] = {}
        self._look()

    def hook(self, event: str, arguments: Sequence[Any]) -> None:
        """What Python calls at every event that can be watched."""
        if event == "import":
            self._look()
            self._importing = str(arguments[0])

    def note_starts(self) -> None:
        """Note from here on who starts threads of Python's: it says so itself since 3.12 alone."""
        start = threading.Thread.start

        def note_and_start(thread: threading.Thread) -> None:
            self._starters.append((thread, _module_under_way() or self._importing, self.index))
            start(thread)

        # In this process alone, which ends with its report.
        threading.Thread.start = note_and_start  # type: ignore[method-assign, assignment]

    def begin(self, index: int, module: str) -> None:
        """One import of the script begins."""
        self._look()
        self.index, self._importing = index, module

    def threads(self) -> list[dict[str, Any]]:
        """The threads that are there to stay, with who has started them."""
        self._look()
        names, until = foreign_threads(), time.monotonic() + _ENDING_S
        while names and time.monotonic() < until:
            time.sleep(_ENDING_S / 100)
            names = {task: name for task, name in foreign_threads().items() if task in self._blamed}
        for thread, module, index in self._starters:
            if thread.native_id in names:
                names[thread.native_id] = thread.name
                self._blamed[thread.native_id] = (module, index)
        return [
            {"name": name, "module": self._blamed[task][0], "import": self._blamed[task][1]}
            for task, name in names.items()
        ]

    def _look(self) -> None:
        for task in foreign_threads():
            self._blamed.setdefault(task, (self._importing, self.index))


def _module_under_way() -> str:
    """The innermost module whose own code is being run; empty where none but the script's is."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if frame.f_code.co_name == "<module>" and name not in {"__main__", _SCRIPT}:
            return name
        frame = frame.f_back
    return ""


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
    watch = ThreadWatch()
    sys.addaudithook(watch.hook)
    watch.note_starts()
    stand_in = sys.modules[_SCRIPT] = ModuleType(_SCRIPT)
    stand_in.__package__ = request["package"]
    scope = vars(stand_in)
    for index, (code, module) in enumerate(zip(request["imports"], request["modules"], strict=True)):
        say(begun=index)
        began = time.monotonic()
        watch.begin(index, module)
        try:
            exec(code, scope)
        except ImportError as error:
            say(missing=index, error=str(error))
        else:
            say(imported=index, took_s=time.monotonic() - began)
    threads = watch.threads()
    say(threads=threads, cuda="" if threads else _cuda())
    if request["model"]:
        exec(request["definitions"], scope)
        say(**size_of(request["model"], scope))


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
