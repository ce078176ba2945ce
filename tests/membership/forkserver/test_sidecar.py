"""Sidecars: started once, restarted when lost, ended with the run."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.events import Event, SidecarLost
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.sidecar import SidecarLauncher, Sidecars
from lightning_ckptless.protocol.messages import StartSidecar

Write = Callable[..., Path]

PROGRAM = """
    import os, signal, sys, time
    what = sys.argv[1]
    with open(f"seen-{what}", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if what == "leaves":
        sys.exit(0)
    if what == "fails":
        sys.exit(3)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what == "orderly":
        def end(*_):
            open("ended", "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
    open(f"ready-{what}", "w").close()
    time.sleep(1000)
"""


class Node:
    """Sidecars, and what they report."""

    def __init__(self, parent: ForkServer, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.events: list[Event] = []
        where = SidecarLauncher(lambda: parent, dict(os.environ), str(folder), (), fresh)
        self.sidecars = Sidecars(where, self.events.append, pause_s=0.05)

    def details(self, name: str) -> list[Any]:
        return [event.details()[name] for event in self.events]

    def ask(self, what: str) -> None:
        self.sidecars.maintain([FromWorker(0, StartSidecar("beside", what))])

    def until(self, good: Callable[[], bool]) -> None:
        while not good():
            self.sidecars.maintain(())
            select.select([], [], [], 0.005)

    def seen(self, what: str) -> list[int]:
        path = self.folder / f"seen-{what}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def ready(self, what: str) -> None:
        self.until((self.folder / f"ready-{what}").exists)


@pytest.fixture(params=[False, True], ids=["forked", "fresh"])
def node(request: pytest.FixtureRequest, bare: ForkServer, write: Write, tmp_path: Path) -> Iterator[Node]:
    """A node whose sidecars run the test's module."""
    write(PROGRAM, "beside.py")
    made = Node(bare, tmp_path, fresh=request.param)
    yield made
    made.sidecars.end(0.0)


def test_a_sidecar_that_is_requested_twice_is_started_once(node: Node) -> None:
    node.ask("orderly")
    node.ready("orderly")
    node.ask("orderly")
    node.ask("stubborn")
    node.ready("stubborn")
    assert [len(node.seen(what)) for what in ("orderly", "stubborn")] == [1, 1]


def test_a_sidecar_that_is_asked_to_end_finishes_its_work(node: Node) -> None:
    node.ask("orderly")
    node.ready("orderly")
    node.sidecars.end(20.0)
    assert (node.folder / "ended").exists()


def test_a_sidecar_that_does_not_end_is_killed(node: Node) -> None:
    node.ask("stubborn")
    node.ready("stubborn")
    node.sidecars.end(0.1)
    (pid,) = node.seen("stubborn")
    assert not Path("/proc", str(pid)).exists()


def test_a_sidecar_that_has_completed_its_work_is_not_restarted(node: Node) -> None:
    node.ask("leaves")
    node.until(lambda: bool(node.seen("leaves")))
    (pid,) = node.seen("leaves")
    node.until(lambda: not Path("/proc", str(pid)).exists())
    node.sidecars.maintain(())
    assert node.events == [] and len(node.seen("leaves")) == 1


def test_a_sidecar_that_has_completed_its_work_is_started_again_on_request(node: Node) -> None:
    node.ask("leaves")
    node.until(lambda: bool(node.seen("leaves")))
    (pid,) = node.seen("leaves")
    node.until(lambda: not Path("/proc", str(pid)).exists())
    node.ask("leaves")
    node.until(lambda: len(node.seen("leaves")) == 2)
    assert node.events == []


def test_a_lost_sidecar_is_restarted(node: Node) -> None:
    node.ask("orderly")
    node.ready("orderly")
    os.kill(node.seen("orderly")[0], signal.SIGKILL)
    node.until(lambda: len(node.seen("orderly")) == 2)
    assert node.events == [SidecarLost("beside", -9, 0.05)]


def test_a_failing_sidecar_is_restarted_after_growing_pauses(node: Node) -> None:
    node.ask("fails")
    node.until(lambda: len(node.events) == 2)
    assert node.details("again_after_s") == [0.05, 0.1]
    assert set(node.details("exit_code")) == {3}


def test_a_sidecar_that_cannot_be_started_does_not_fail_the_run(write: Write, tmp_path: Path) -> None:
    with ForkServer(("nowhere",)) as parent:
        node = Node(parent, tmp_path)
        node.ask("orderly")
        assert node.details("exit_code") == [None]
        node.sidecars.end(0.0)
