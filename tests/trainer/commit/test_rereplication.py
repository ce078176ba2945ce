"""Copies are filled in beside training, and waited for before anything is written over the restored version."""

from __future__ import annotations

import threading

import pytest

from lightning_ckptless.errors import ProtocolError, TransportError
from lightning_ckptless.trainer.commit.rereplication import Rereplication


def test_training_goes_on_until_it_has_something_to_mirror() -> None:
    gate, order = threading.Event(), list[str]()

    def work() -> None:
        gate.wait(20)
        order.append("filled in")

    protecting = Rereplication(work)
    order.append("first step")
    gate.set()
    assert protecting.wait() >= 0
    assert order == ["first step", "filled in"]


def test_what_went_wrong_is_raised_where_it_is_waited_for() -> None:
    def work() -> None:
        raise TransportError("rank 1 is gone")

    with pytest.raises(TransportError, match="rank 1 is gone"):
        Rereplication(work).wait()


def test_a_bug_is_not_taken_for_success(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))

    def work() -> None:
        raise KeyError("a bug")

    with pytest.raises(ProtocolError, match="were not made"):
        Rereplication(work).wait()
    assert told == [KeyError]


def test_it_is_left_behind_where_nobody_sets_it_free(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    protecting = Rereplication(lambda: assert_(gate.wait(20)))
    protecting.abandon(0.01)
    assert "is abandoned" in caplog.text
    gate.set()
    protecting.wait()


def assert_(is_true: bool) -> None:
    """An assertion as an expression."""
    assert is_true
