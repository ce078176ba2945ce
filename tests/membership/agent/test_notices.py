"""Notices that a node is about to be taken away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.agent.notices import Notices, SigtermNotice, load_hook
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import NoticeFailed
from lightning_ckptless.membership.events import Event

Make = Callable[..., Notices]
reported: list[Event] = []


@pytest.fixture
def notices() -> Iterator[Make]:
    """Return a function that makes the notices of a function; they are closed at the end."""
    reported.clear()
    with ExitStack() as stack:

        def make(hook: Callable[[], object] | None, clock: Clock | None = None) -> Notices:
            made = Notices(SigtermNotice(), "site.notice", hook, reported.append, clock or Clock(), every_s=0.001)
            stack.callback(made.close)
            return made

        yield make


def first(made: Notices) -> str:
    """Take a notice, once there is one."""
    while not (found := made.take()):
        threading.Event().wait(0.001)
    return found


def test_a_function_gives_notice(notices: Make) -> None:
    answers = iter([False, None, "in 30 s"])
    made = notices(lambda: next(answers))
    assert first(made) == "site.notice gave notice: in 30 s"
    assert made.take() == ""
    assert first(notices(lambda: True)) == "site.notice gave notice"


def test_a_function_that_raises_is_reported_once_and_called_again(notices: Make) -> None:
    calls: list[int] = []

    def hook() -> bool:
        calls.append(1)
        if len(calls) < 5:
            raise ConnectionError("no answer")
        return True

    made = notices(hook)
    assert first(made)
    (failed,) = reported
    assert isinstance(failed, NoticeFailed) and failed.reason == "it raised ConnectionError: no answer"


def test_a_function_that_does_not_return_is_reported_and_delays_nothing(notices: Make) -> None:
    now, called, released = [0.0], threading.Event(), threading.Event()

    def hook() -> bool:
        called.set()
        return not released.wait(60)

    made = notices(hook, Clock(lambda: now[0], lambda: now[0]))
    assert made.take() == ""
    called.wait(60)
    now[0] = 40.0
    assert made.take() == made.take() == ""
    released.set()
    (failed,) = reported
    assert isinstance(failed, NoticeFailed) and failed.reason == "it has not returned for 40 s"


def test_sigterm_is_a_notice() -> None:
    sigterm = SigtermNotice()
    made = Notices(sigterm, "", None, reported.append, Clock())
    assert made.take() == ""
    sigterm.give()
    assert (made.take(), made.take()) == ("the agent received SIGTERM", "")


def test_the_function_is_found_next_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "notice_of_site.py").write_text("def soon(): return 'soon'\nlater = 1\n")
    hook = load_hook("notice_of_site.soon", [str(tmp_path)])
    assert hook is not None and hook() == "soon"
    for name in ("notice_of_site.never", "notice_of_site.later", "soon", "no_such_module.soon"):
        with pytest.raises(OptionsError, match=f"preemption_notice='{name}': expected the dotted name of a function"):
            load_hook(name, [str(tmp_path)])
    assert load_hook("", []) is None
