"""The successor of the fork server: what it leaves out, what its forks have, and that no process survives."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_ckptless.membership.events import Event
from lightning_ckptless.membership.forkserver.client import ForkServer, ForkServerLostError, Successor
from lightning_ckptless.membership.forkserver.import_learning import ImportRequest
from lightning_ckptless.membership.forkserver.imported import Imported, changed_variables, installed_modules
from lightning_ckptless.membership.forkserver.succession import Succession
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.replacement_startup import Imports
from tests.membership.conftest import finish, run_forked, script, start, worker_env

WAIT_S = 60.0


@pytest.fixture
def teach(write: Callable[..., Path], tmp_path: Path) -> Callable[..., ImportRequest]:
    """Makes a request of modules with these texts."""

    def teach(texts: dict[str, str], changed: dict[str, str | None] | None = None, **env: str) -> ImportRequest:
        modules = {name: str(write(text, f"site-packages/{name}.py")) for name, text in texts.items()}
        job = Job(script(write("", "program.py"), "--lr", "1"), worker_env(env), str(tmp_path))
        return ImportRequest(Imported(modules, changed or {}, [str(tmp_path / "site-packages"), *sys.path]), job)

    return teach


@pytest.fixture
def succession(bare: ForkServer) -> Iterator[Callable[[ImportRequest], tuple[Succession, list[Event]]]]:
    """Follows a succession to its end."""
    made: list[Succession] = []

    def follow(request: ImportRequest) -> tuple[Succession, list[Event]]:
        events: list[Event] = []
        succession = Succession(events.append)
        made.append(succession)
        succession.learn(request)
        while succession.state in (Imports.WAITING, Imports.IMPORTING):
            if succession.state is Imports.IMPORTING:
                assert select.select([_socket(succession)], [], [], WAIT_S)[0], "no answer"
            succession.maintain(bare)
        return succession, events

    yield follow
    for each in made:
        each.close()


def _socket(succession: Succession) -> Any:
    assert succession._successor is not None
    return succession._successor._socket


EFFECTS = {
    "import threading; threading.Thread(target=threading.Event().wait, name='pump', daemon=True).start()": (
        "starts a thread: pump"
    ),
    "import tempfile; file = tempfile.TemporaryFile()": "leaves a file or a connection open",
    "import random; random.seed(1)": "draws random numbers or seeds a generator",
    "import os; rank = os.getenv('LOCAL_RANK')": "reads LOCAL_RANK, which differs between workers",
    "import os; home = os.environ.get('HUB_HOME')": "reads HUB_HOME, which the script sets",
    "raise RuntimeError('not here')": "cannot be imported alone: RuntimeError: not here",
    "import sys; sys.exit(3)": "cannot be imported alone: SystemExit: 3",
}


def test_modules_that_a_fork_could_not_share_are_left_out(
    teach: Callable[..., ImportRequest], succession: Callable[[ImportRequest], tuple[Succession, list[Event]]]
) -> None:
    """All in one process, each recognized separately; modules that depend on one are left out with it."""
    texts = {f"unsafe{number}": text for number, text in enumerate(EFFECTS)}
    texts |= {"user": "try:\n    import unsafe2\nexcept ImportError:\n    unsafe2 = None\n", "safe": ""}
    followed, events = succession(teach(texts, {"HUB_HOME": "/elsewhere"}))
    event, fields = events[-1].name, events[-1].details()
    assert event == "imports_learned"
    expected = dict(zip(texts, EFFECTS.values(), strict=False))
    assert fields["left_out"] == {**expected, "user": "imports unsafe2"}
    assert followed.successor is not None


def test_forks_have_the_modules_and_their_environment_changes(
    teach: Callable[..., ImportRequest],
    succession: Callable[[ImportRequest], tuple[Succession, list[Event]]],
    write: Callable[..., Path],
    bare: ForkServer,
    tmp_path: Path,
) -> None:
    request = teach(
        {"settler": "import os, sys\nos.environ.setdefault('QUIET', '1')\nseen = (sys.argv[1:], os.getcwd())\n"},
        {"QUIET": "1"},
    )
    followed, _ = succession(request)
    parent = followed.successor
    assert parent is not None
    program = script(
        write(
            """
            import os, sys
            settler = sys.modules.get("settler")
            print(settler and settler.seen, os.environ.get("QUIET"), sys.path[0], os.getpriority(os.PRIO_PROCESS, 0))
            """
        )
    )
    expected = f"{(['--lr', '1'], str(tmp_path))} 1 {tmp_path} {os.getpriority(os.PRIO_PROCESS, 0)}\n"
    assert run_forked(parent, program, tmp_path).out == expected
    assert run_forked(bare, program, tmp_path).out.startswith("None None")


def test_a_module_that_is_found_elsewhere_is_left_out(
    teach: Callable[..., ImportRequest], succession: Callable[[ImportRequest], tuple[Succession, list[Event]]]
) -> None:
    request = teach({"shadow": ""})
    request.imported.modules["shadow"] = "/elsewhere/site-packages/shadow.py"
    _, events = succession(request)
    assert events[-1].details()["left_out"]["shadow"].startswith("is found in ")


def test_an_import_that_ends_the_process(
    teach: Callable[..., ImportRequest], succession: Callable[[ImportRequest], tuple[Succession, list[Event]]]
) -> None:
    followed, events = succession(teach({"fatal": "import os; os._exit(1)"}))
    assert (followed.state, followed.successor) == (Imports.GIVEN_UP, None)
    assert events[-1].name == "imports_not_learned"


def test_after_the_loss_of_the_successor_the_first_fork_server_forks_until_there_is_another(
    teach: Callable[..., ImportRequest],
    succession: Callable[[ImportRequest], tuple[Succession, list[Event]]],
    write: Callable[..., Path],
    bare: ForkServer,
    tmp_path: Path,
) -> None:
    followed, _ = succession(teach({"safe": ""}))
    parent = followed.successor
    assert isinstance(parent, Successor) and parent.pid is not None
    job = Job(script(write("import time; time.sleep(1000)")), worker_env(), str(tmp_path))
    worker = start(parent, job, tmp_path)
    os.kill(parent.pid, signal.SIGKILL)
    assert select.select([worker.pidfd], [], [], WAIT_S)[0]
    with pytest.raises(ForkServerLostError):
        parent.end_of(worker)
    os.close(worker.pidfd)
    assert followed.successor is None
    seen = []
    for _ in range(2):
        followed.maintain(bare)
        seen.append(followed.state)
    assert seen == [Imports.WAITING, Imports.IMPORTING]


def test_the_successor_exits_with_the_first_fork_server(
    teach: Callable[..., ImportRequest], write: Callable[..., Path], tmp_path: Path
) -> None:
    with ForkServer() as first:
        successor = Successor(first)
        successor.learn(teach({"safe": ""}).to_message())
        pidfd = os.pidfd_open(successor.pid or 0)
        # Both serve at the same time.
        job = Job(script(write("")), worker_env(), str(tmp_path))
        assert finish(first, start(first, job, tmp_path), tmp_path).exit_code == 0
    assert select.select([pidfd], [], [], WAIT_S)[0]
    os.close(pidfd)
    successor.close()


def _module(name: str, file: str, **more: Any) -> ModuleType:
    from importlib.machinery import ModuleSpec

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=file)
    module.__spec__.has_location = True
    vars(module).update(more)
    return module


def test_modules_that_count_as_installed() -> None:
    site = "/env/lib/python3.11/site-packages"
    modules = {
        "heavy": _module("heavy", f"{site}/heavy/__init__.py"),
        "json.tool": _module("json.tool", f"{os.path.dirname(os.__file__)}/json/tool.py"),
        "mine": _module("mine", "/home/me/mine.py"),
        "alias": _module("other", f"{site}/other.py"),
        "known": _module("known", f"{site}/known.py"),
        "bare": ModuleType("bare"),
    }
    program = _module("__main__", "", __file__="/home/me/train.py")
    assert list(installed_modules(modules, {"known"}, program)) == ["heavy", "json.tool"]
    # A program that is installed itself is run by every process, with its package.
    package = _module("__main__", "", __file__=f"{site}/heavy/train.py", __package__="heavy")
    assert list(installed_modules(modules, {"known"}, package)) == ["json.tool"]


def test_variables_that_have_changed() -> None:
    before, after = {"A": "1", "B": "2", "C": "3"}, {"A": "1", "B": "3", "D": "4"}
    assert changed_variables(before, after) == {"B": "3", "C": None, "D": "4"}
