"""Rereplication runs beside training, and finishes before the restored version is overwritten."""

from __future__ import annotations

import threading

import pytest

from lightning_ckptless.errors import ProtocolError, TransportError
from lightning_ckptless.trainer.commit.rereplication import Rereplication


def test_training_continues_until_it_has_something_to_mirror() -> None:
    gate, order = threading.Event(), list[str]()

    def work() -> None:
        gate.wait(20)
        order.append("filled in")

    protecting = Rereplication(work)
    order.append("first step")
    gate.set()
    assert protecting.wait() >= 0
    assert order == ["first step", "filled in"]


def test_an_error_in_the_background_is_raised_by_wait() -> None:
    def work() -> None:
        raise TransportError("rank 1 is gone")

    with pytest.raises(TransportError, match="rank 1 is gone"):
        Rereplication(work).wait()


def test_a_crashed_thread_is_not_taken_for_success(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))

    def work() -> None:
        raise KeyError("a bug")

    with pytest.raises(ProtocolError, match="were not made"):
        Rereplication(work).wait()
    assert told == [KeyError]


def test_a_blocked_thread_is_abandoned_after_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    protecting = Rereplication(lambda: assert_(gate.wait(20)))
    protecting.abandon(0.01)
    assert "is abandoned" in caplog.text
    gate.set()
    protecting.wait()


def assert_(is_true: bool) -> None:
    """An assertion as an expression."""
    assert is_true
