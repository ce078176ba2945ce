"""The sidecar that repeats the health check."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.messages import NodeUnfit
from lightning_ckptless.trainer.session import health_watch
from lightning_ckptless.trainer.session.health_watch import HealthWatchSettings, watch

CALLS: list[int] = []
OVER = threading.Event()


def passes_once() -> None:
    """A check that fails from the second call on, and ends the watch with the third."""
    CALLS.append(len(CALLS))
    if len(CALLS) == 3:
        OVER.set()
    if len(CALLS) > 1:
        raise ConnectionError("no link to the switch")


def hangs() -> None:
    """A check that does not return while the test runs."""
    OVER.set()
    threading.Event().wait(5)


def _received(check: str) -> list[str]:
    ours, theirs = AgentChannel.pair()
    OVER.clear()
    watch(HealthWatchSettings.of(f"{__name__}.{check}", every_s=0.001), theirs, OVER)
    messages = [received.message for received in ours.poll()]
    for channel in (ours, theirs):
        channel.close()
    assert all(isinstance(message, NodeUnfit) for message in messages)
    return [message.finding for message in messages if isinstance(message, NodeUnfit)]


def test_each_failed_check_is_sent() -> None:
    CALLS.clear()
    assert _received("passes_once") == [f"{__name__}.passes_once raised ConnectionError: no link to the switch"] * 2


def test_a_check_that_does_not_return_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_watch, "LONGEST_S", 0.1)
    assert _received("hangs") == [f"{__name__}.hangs has not returned for 0 s"]


def test_the_order_says_where_the_function_is() -> None:
    settings = HealthWatchSettings.of("tests.lab.kinds.disk_answers", 2.0)
    assert (Path(settings.path) / "tests" / "lab" / "kinds.py").exists()
    assert HealthWatchSettings.from_text(settings.to_text()) == settings
    assert HealthWatchSettings.of("", 2.0).path == ""


def test_a_function_of_the_script_cannot_be_called_by_another_process() -> None:
    with pytest.raises(OptionsError, match="it has to be in a module of its own"):
        CkptlessOptions(health_check="__main__.check", health_check_every_s=1.0)
