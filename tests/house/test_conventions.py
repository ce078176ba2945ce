"""What the code must not do: swallow errors, sleep in tests, use fixed ports, use private names of others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.house.code import PACKAGE, Source, dotted, findings, private_names, sources

CODE = sources(PACKAGE)
TESTS = sources("tests")

# Files that catch any exception, and why nothing narrower would do. Handlers that raise it again are not listed.
CATCHES_EVERYTHING = {
    f"{PACKAGE}/_registration/autoload.py": "an error would make `import torch` fail in every program",
    f"{PACKAGE}/membership/worker/startup.py": "like the interpreter, it reports whatever a program raises",
    f"{PACKAGE}/membership/forkserver/import_learning.py": "whatever a module raises is the reason to exclude it",
    f"{PACKAGE}/trainer/session/health_check.py": "whatever the user's check raises is its result",
    f"{PACKAGE}/membership/agent/notices.py": "whatever the user's function raises is reported",
    f"{PACKAGE}/trainer/outputs/loggers.py": "a logger that fails while fit ends must not hide the reason for the end",
    f"{PACKAGE}/membership/forkserver/forked_call.py": "as startup.py: whatever a call raises ends the process",
    f"{PACKAGE}/trainer/strategy/notebook.py": "how exceptions of a program are pickled is up to their classes",
    f"{PACKAGE}/trainer/recovery/recovery_loop.py": "the boundary of the fit loop: raises errors that are no faults",
    f"{PACKAGE}/replica/mirror/mirror.py": "the boundary of the thread: the training thread raises it",
}
# Private by name, but documented for general use.
COMMON = {"os._exit", "pickle._Pickler", "sys._current_frames", "sys._getframe"}
# Names that a subclass shares with its base class, which mostly belongs to another project.
INHERITED = {
    f"{PACKAGE}/lightning_pytorch.py": {"lightning.pytorch.strategies.launchers.launcher._Launcher"},
    f"{PACKAGE}/pytorch_lightning.py": {"pytorch_lightning.strategies.launchers.launcher._Launcher"},
    f"{PACKAGE}/trainer/strategy/recoverable.py": {"self._get_process_group_backend", "self._timeout"},
}
HOSTS = (f"{PACKAGE}/internals/",)
FIXED_ADDRESS = re.compile(r"(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\]):[1-9]\d")


def catches_everything(source: Source) -> bool:
    """Whether a handler takes any exception and does not raise it again as its last act."""
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or dotted(kind) in {"Exception", "BaseException"} for kind in kinds)
            last = node.body[-1]
            if broad and not (isinstance(last, ast.Raise) and last.exc is None):
                return True
    return False


def test_errors_are_not_swallowed() -> None:
    assert {str(source) for source in CODE if catches_everything(source)} == set(CATCHES_EVERYTHING)


def test_private_names_of_other_projects_are_used_only_in_internals() -> None:
    def foreign(source: Source) -> Iterator[str]:
        allowed = COMMON | INHERITED.get(str(source), set())
        return (f"line {line}: {name}" for line, name in private_names(source) if name not in allowed)

    assert findings((source for source in CODE if not str(source).startswith(HOSTS)), foreign) == {}


def test_tests_do_not_sleep() -> None:
    def sleeps(source: Source) -> Iterator[str]:
        calls = (node for node in source.nodes if isinstance(node, ast.Call))
        return (f"line {call.lineno}" for call in calls if dotted(call.func) in {"time.sleep", "sleep"})

    assert findings(TESTS, sleeps) == {}


def test_no_port_is_fixed() -> None:
    assert findings([*CODE, *TESTS, *sources("examples", "benchmarks")], fixed_ports) == {}


def fixed_ports(source: Source) -> Iterator[str]:
    """Return ports that are written as numbers."""
    for node in source.nodes:
        match node:
            case ast.Constant(value=str(text)) if FIXED_ADDRESS.search(text):
                yield f"line {node.lineno}: {text!r}"
            case ast.keyword(arg=str(name), value=ast.Constant(value=int(number))) if "port" in name and number > 1:
                yield f"line {node.lineno}: {name}={number}"
            case _:
                pass
