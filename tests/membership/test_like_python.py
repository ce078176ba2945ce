"""A forked worker behaves like a new process: the same script, run both ways, does the same."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.worker.program import Program
from tests.membership.conftest import run_forked, run_fresh, script, worker_env

SCRIPTS = {
    "names": """
        import sys
        print(__name__, __file__, __package__, __spec__, __cached__, type(__loader__), __doc__, type(__builtins__))
        print(sys.argv, sys.orig_argv[1:], sys.path, sys.modules["__main__"].__dict__ is globals())
    """,
    "main guard": """
        def main():
            print("in main")
        if __name__ == "__main__":
            main()
    """,
    "exit with a code": "import sys; sys.exit(3)",
    "exit with a message": "import sys; sys.exit('no more data')",
    "exit with nothing": "import sys; sys.exit()",
    "exit with a tuple": "raise SystemExit(1, 2)",
    "hard exit": "import os; print('out'); os._exit(7)",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "raises": """
        def inner():
            raise ValueError("wrong shape")
        def outer():
            inner()
        outer()
    """,
    "raises from": """
        try:
            {}["absent"]
        except KeyError as error:
            raise RuntimeError("not found") from error
    """,
    "raises in a thread": """
        import threading
        threading.Thread(target=lambda: 1 / 0, name="worker-1").start()
    """,
    "syntax error": "def broken(:\n    pass\n",
    "own hook": """
        import sys
        sys.excepthook = lambda kind, error, traceback: print("hook", kind, error, traceback.tb_frame.f_code.co_name)
        raise OSError("disk")
    """,
    "ends in order": """
        import atexit, threading, time
        atexit.register(print, "last")
        done = threading.Event()
        def linger():
            done.wait()
            print("thread is done")
        threading.Thread(target=linger).start()
        threading.Timer(0.05, done.set).start()
        print("main is done")
    """,
    "exit during atexit": """
        import atexit
        class Fails:
            __repr__ = lambda self: "fails"
            def __call__(self):
                1 / 0
        atexit.register(Fails())
    """,
    "stdin is empty": "import sys; print(repr(sys.stdin.read()), sys.stdin.fileno())",
    "streams": """
        import sys
        for s in (sys.stdout, sys.stderr):
            print(s.fileno(), s.name, s.encoding, s.errors, s.write_through, s.isatty())
        print(sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__)
        sys.stdout.write("no newline")
        sys.stdout.buffer.write(b" and bytes")
    """,
    "environment": """
        import os
        del os.environ["CKPTLESS_MAIN_AT"]
        print(sorted(os.environ.items()), os.getcwd())
    """,
    "signals": """
        import signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD, signal.SIGALRM):
            print(number, signal.getsignal(number))
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    """,
    "files": "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))",
    "threads": "import os, threading; print(len(os.listdir('/proc/self/task')), threading.current_thread().name)",
    "pickles its own class": """
        import pickle
        class Point:
            pass
        print(type(pickle.loads(pickle.dumps(Point()))) is Point, Point.__module__)
    """,
    "processes": """
        import multiprocessing as mp
        class Point:
            pass
        def work(queue, point):
            queue.put((__name__, type(point) is Point, type(point).__module__))
        if __name__ == "__main__":
            for method in ("fork", "spawn"):
                context = mp.get_context(method)
                queue = context.SimpleQueue()
                process = context.Process(target=work, args=(queue, Point()))
                process.start()
                print(method, queue.get())
                process.join()
                print(process.exitcode)
    """,
    "imports beside it": "import beside; print(beside.__name__, beside.value)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("value = 5\n")
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name: str, parent: ForkServer, write: Callable[..., Path], folder: Path) -> None:
    program = script(write(SCRIPTS[name]), "--lr", "0.1")
    env = worker_env({environment.MAIN_AT: "0"})
    assert run_forked(parent, program, folder, env) == run_fresh(program, folder, env)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (Program("script", "absent.py"), 2),
        (Program("script", "relative.py", ("x",)), 0),
        (Program("script", "sub/../link.py"), 0),
        (Program("script", "./relative.py"), 0),
        (Program("script", "folder"), 0),
        (Program("script", "archive.zip", ("y",)), 0),
        (Program("module", "package", ("z",)), 0),
        (Program("module", "package.tool", ("--m",)), 0),
        (Program("module", "package.broken"), 1),
    ],
)
def test_other_kinds_of_script(
    program: Program, code: int, parent: ForkServer, write: Callable[..., Path], folder: Path
) -> None:
    show = "import sys; print(__name__, __file__, __package__, __spec__ and __spec__.name, sys.argv, sys.path[0])"
    write(show, "relative.py")
    write(show, "sub/linked.py")
    (folder / "link.py").symlink_to("sub/linked.py")
    for name in ("folder/__main__.py", "package/__main__.py", "package/tool.py"):
        write(show, name)
    write("", "package/__init__.py")
    write("import package.nowhere", "package/broken.py")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", show)
    forked, fresh = run_forked(parent, program, folder), run_fresh(program, folder)
    assert forked.exit_code == fresh.exit_code == code
    assert forked.out == fresh.out
    assert forked.err.splitlines()[-1:] == fresh.err.splitlines()[-1:]


@pytest.mark.parametrize("name", ["nowhere", "package.nowhere", "package"])
def test_a_module_that_does_not_exist(name: str, parent: ForkServer, write: Callable[..., Path], folder: Path) -> None:
    write("", "package/__init__.py")
    forked = run_forked(parent, Program("module", name), folder)
    assert forked.exit_code == 1
    assert f"No module named {name}" in forked.err


def test_interrupt_shows_as_in_a_shell(parent: ForkServer, write: Callable[..., Path], folder: Path) -> None:
    forked = run_forked(parent, script(write("raise KeyboardInterrupt")), folder)
    assert forked.exit_code == 130
    assert forked.err.endswith("KeyboardInterrupt\n")


def test_random_numbers_differ_between_workers(parent: ForkServer, write: Callable[..., Path], folder: Path) -> None:
    program = script(
        write("import random, numpy, torch; print(random.random()); print(numpy.random.rand()); print(torch.rand(1))")
    )
    first, second = (run_forked(parent, program, folder).out.splitlines() for _ in range(2))
    assert len(first) == 3
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_torch_uses_as_many_threads_as_the_environment_says(
    parent: ForkServer, write: Callable[..., Path], folder: Path
) -> None:
    program = script(write("import torch; print(torch.get_num_threads())"))
    for count in ("1", "3"):
        assert run_forked(parent, program, folder, worker_env({"OMP_NUM_THREADS": count})).out == f"{count}\n"


def test_nothing_of_the_fork_server_is_visible(parent: ForkServer, write: Callable[..., Path], folder: Path) -> None:
    ran = run_forked(parent, script(write("import os; print(dict(os.environ))")), folder, {"ONLY": "this"})
    assert "OPENBLAS_NUM_THREADS" not in ran.out
    assert "'ONLY': 'this'" in ran.out
