"""The outbox delivers each row to a logger once, when its step is committed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.outputs.outbox import Marks, Outbox


class Store:
    """A logger that records its calls."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.got.append((step, metrics))

    def save(self) -> None:
        self.got.append("save")

    def finalize(self, status: str) -> None:
        self.got.append(status)


class Figure:
    """An object that is not plain data but can be pickled."""


def version(step: int) -> Version:
    return Version(step, True)


Make = Callable[[Any], Outbox]


@pytest.fixture
def outbox_of(tmp_path: Path) -> Iterator[Make]:
    """Makes outboxes that share their marks, like those of successive processes."""
    made: list[Outbox] = []

    def make(logger: Any) -> Outbox:
        made.append(Outbox([logger], Marks([tmp_path / "marks"])))
        return made[-1]

    yield make
    for outbox in made:
        outbox.remove()


def restore(outbox: Outbox, saved: Any, rewound: tuple[Any, ...] = ()) -> None:
    outbox.restore(unpack(pack(saved)), rewound=rewound, before=lambda *_: None)


def steps(logger: Store) -> list[int]:
    return [entry[0] for entry in logger.got if isinstance(entry, tuple)]


def a_step(logger: Any, outbox: Outbox, step: int) -> Any:
    """Log a row and capture the version that includes it."""
    logger.log_metrics({"loss": step / 8}, step=step)
    logger.save()
    return outbox.capture(version(step + 1))


def test_a_row_waits_for_the_version_of_its_step(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    a_step(logger, outbox, 0)
    logger.log_metrics({"loss": 1.0}, step=1)
    outbox.deliver(version(0))
    outbox.deliver(None)
    assert logger.got == []
    outbox.deliver(version(1))
    assert logger.got == [(0, {"loss": 0.0}), "save"]
    a_step(logger, outbox, 2)
    outbox.deliver(version(3))
    assert steps(logger) == [0, 1, 2]


def test_rows_of_an_abandoned_version_are_delivered_with_the_next(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    for step in range(3):
        a_step(logger, outbox, step)
    outbox.deliver(version(2))
    assert steps(logger) == [0, 1]


def test_saving_is_in_order_and_immediate_if_nothing_is_held(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    logger.save()
    assert logger.got == ["save"]
    for _ in range(2):
        a_step(logger, outbox, 0)
        logger.save()
    outbox.flush()
    assert logger.got[1:] == [(0, {"loss": 0.0}), "save"] * 2


def test_finalizing_comes_after_all_rows(outbox_of: Make) -> None:
    logger = Store()
    outbox_of(logger)
    logger.log_metrics({"loss": 1.0}, step=4)
    logger.finalize("success")
    assert logger.got == [(4, {"loss": 1.0}), "success"]


def test_later_changes_of_logged_values_have_no_effect(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    metrics: dict[str, Any] = {"loss": torch.ones(1), "each": {"a": torch.zeros(2)}}
    logger.log_metrics(metrics, 0)
    metrics["loss"] += 1
    metrics["each"]["a"] += 1
    metrics["more"] = torch.ones(1)
    outbox.flush()
    (_, got) = logger.got[0]
    assert got["loss"] == 1
    assert got["each"]["a"].tolist() == [0, 0]
    assert "more" not in got


# ---------------------------------------------------------------------- after a fault


def test_a_survivor_drops_rows_that_were_not_committed(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    saved = a_step(logger, outbox, 0)
    a_step(logger, outbox, 1)
    restore(outbox, saved)
    assert steps(logger) == [0]
    a_step(logger, outbox, 1)
    outbox.deliver(version(2))
    assert steps(logger) == [0, 1]


@pytest.mark.parametrize("delivered", [0, 1, 2])
def test_a_new_process_delivers_only_rows_that_its_predecessor_has_not(delivered: int, outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    *_, saved = (a_step(logger, outbox, step) for step in range(2))
    outbox.deliver(version(delivered))
    fresh = Store()
    fresh.got = list(logger.got)
    successor = outbox_of(fresh)
    fresh.log_metrics({"setup": 1.0})
    restore(successor, saved)
    assert steps(fresh) == [0, 1]
    a_step(fresh, successor, 2)
    successor.deliver(version(3))
    assert steps(fresh) == [0, 1, 2]


def test_replayed_steps_whose_rows_were_delivered_are_not_logged_twice(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    saved = a_step(logger, outbox, 0)
    a_step(logger, outbox, 1)
    outbox.flush()
    fresh = Store()
    successor = outbox_of(fresh)
    restore(successor, saved)
    for step in (1, 2):
        a_step(fresh, successor, step)
    successor.flush()
    assert steps(fresh) == [2]


def test_rows_of_a_rewound_file_are_delivered_again(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    saved = a_step(logger, outbox, 0)
    outbox.flush()
    fresh = Store()
    restore(outbox_of(fresh), saved, rewound=(fresh,))
    assert steps(fresh) == [0]


def test_a_run_that_starts_over_logs_all_rows_again(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    a_step(logger, outbox, 0)
    outbox.flush()
    fresh = Store()
    again = outbox_of(fresh)
    again.start_over()
    a_step(fresh, again, 0)
    again.flush()
    assert steps(fresh) == [0]


def test_a_rank_without_a_saved_state_starts_empty(outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    a_step(logger, outbox, 0)
    outbox.restore(None, rewound=(), before=lambda *_: None)
    assert logger.got == []


def test_rows_with_objects_are_kept_if_they_can_be_pickled(outbox_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    logger.log_metrics({"figure": Figure()}, step=0)
    logger.log_metrics({"callable": lambda: None}, step=1)
    logger.log_metrics({"loss": 1.0}, step=2)
    saved = outbox.capture(version(1))
    restore(outbox, saved)
    assert steps(logger) == [0, 1, 2]
    fresh = Store()
    restore(outbox_of(fresh), saved, rewound=(fresh,))
    assert steps(fresh) == [0, 2]
    assert isinstance(fresh.got[0][1]["figure"], Figure)
    assert "Store: rows with callable were lost" in caplog.text


def test_a_row_with_objects_that_are_not_trusted_is_lost_with_its_process(
    outbox_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    logger.log_metrics({"figure": Figure()}, step=0)
    logger.log_metrics({"loss": 1.0}, step=1)
    saved = outbox.capture(version(1), lambda _: False)
    fresh = Store()
    restore(outbox_of(fresh), saved, rewound=(fresh,))
    assert steps(fresh) == [1]
    assert "Store: rows with figure were lost" in caplog.text


def test_rows_are_still_held_after_the_logger_fails(outbox_of: Make) -> None:
    logger = Mock(Store)
    logger.log_metrics.side_effect = [None, ConnectionError("server is away"), None]
    own = logger.log_metrics
    outbox = outbox_of(logger)
    for step in range(2):
        logger.log_metrics({}, step=step)
    with pytest.raises(ConnectionError):
        outbox.flush()
    outbox.flush()
    assert [call.kwargs["step"] for call in own.call_args_list] == [0, 1, 1]


def test_marks_survive_if_one_of_the_files_is_writable(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    paths = [tmp_path / "a-file" / "marks", tmp_path / "folder" / "marks"]
    marks = Marks(paths)
    marks.write(1, 7)
    marks.close()
    again = Marks(paths)
    assert [again.read(logger) for logger in range(3)] == [0, 7, 0]
    again.clear()
    assert again.read(1) == 0
    again.close()


# ---------------------------------------------------------------------- the user's logger


def test_the_loggers_methods_are_restored_after_fit(outbox_of: Make) -> None:
    logger = Store()
    before = dict(vars(logger))
    outbox = outbox_of(logger)
    outbox.remove()
    assert vars(logger) == before
    logger.log_metrics({}, 0)
    assert steps(logger) == [0]


def test_methods_of_the_instance_are_restored(outbox_of: Make) -> None:
    logger, calls = Store(), list[Any]()
    logger.save = own = lambda: calls.append("own")  # type: ignore[method-assign]
    outbox = outbox_of(logger)
    logger.save()
    outbox.remove()
    assert calls == ["own"]
    assert logger.save is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_a_copy_of_the_logger_has_the_original_methods(copied: Any, outbox_of: Make) -> None:
    logger = Store()
    outbox = outbox_of(logger)
    logger.log_metrics({"loss": 1.0}, 0)
    twin = copied(logger)
    twin.log_metrics({"loss": 2.0}, 1)
    twin.save()
    assert twin.got == [(1, {"loss": 2.0}), "save"]
    outbox.flush()
    assert logger.got == [(0, {"loss": 1.0})]


def test_signatures_are_preserved(outbox_of: Make) -> None:
    logger = Store()
    expected = inspect.signature(logger.log_metrics)
    outbox_of(logger)
    assert inspect.signature(logger.log_metrics) == expected
    assert logger.log_metrics.__name__ == "log_metrics"
