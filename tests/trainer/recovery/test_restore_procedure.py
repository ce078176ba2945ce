"""The steps that put a version into a rank: the same order for a survivor, a replacement and a new process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.recovery import restore_procedure
from lightning_ckptless.trainer.recovery.restore_procedure import RestoreProcedure

VERSION = Version(3, True)
BEFORE = ["tensors"]
HOOKS = ["host state without settings", "start hooks"]
MAKE = ["make dataloaders", "host state", "rewinds", "loggers"]
MOVE = ["open virtual ranks", "sampler epochs", "move data", "forget batches", "move virtual ranks"]
REPLAY = ["open virtual ranks", "replay batches", "move virtual ranks"]


class Rank:
    """One rank whose parts note what is asked of them."""

    def __init__(self, *, trained: bool, opened_for: int = 2) -> None:
        self.steps: list[str] = []
        self.holds: list[tuple[bool, str | None]] = []
        self.trained = trained
        self.lacks_modules = False
        self.virtual_ranks = SimpleNamespace(
            opened_for=opened_for,
            count=2,
            open=self.note("open virtual ranks"),
            move_to=self.note("move virtual ranks"),
        )
        self.data = SimpleNamespace(
            loops=SimpleNamespace(set_sampler_epochs=self.note("sampler epochs"), move_data=self.note("move data")),
            hooks=SimpleNamespace(make_as=self.note("make dataloaders")),
            virtual_ranks=self.virtual_ranks,
            reopen=self.note("reopen"),
            reopen_training_data=self.note("reopen training data"),
        )
        self.boundaries = SimpleNamespace(last=None)
        self.running = SimpleNamespace(
            mirroring=SimpleNamespace(
                optimizers_hold=lambda version: trained, index_of=lambda layout: "index" if trained else None
            ),
            rank_state=SimpleNamespace(host_state=SimpleNamespace(apply=self.apply)),
            batches=SimpleNamespace(go_back_to=self.go_back_to, reset=self.note("forget batches")),
            boundaries=self.boundaries,
            rewinding=SimpleNamespace(restore=self.note("rewinds")),
        )
        session = SimpleNamespace(trainer=None, loggers=SimpleNamespace(restore=self.note("loggers")))
        self.restoration = SimpleNamespace(
            version=VERSION,
            layout=None,
            state={"data": None},
            logs=None,
            host_state={"data_hooks": {}, "virtual_ranks": {}, "rewinds": {}},
            fill=self.fill,
            lacks_modules=lambda trainer: self.lacks_modules,
            resume=self.note("resume"),
        )
        self.procedure = RestoreProcedure(
            cast("Any", session), cast("Any", self.data), cast("Any", self.running), nullcontext
        )

    def note(self, step: str) -> Callable[..., None]:
        return lambda *_: self.steps.append(step)

    def fill(self, trainer: Any, *, optimizers_hold: bool, index: str | None) -> None:
        self.steps.append("tensors")
        self.holds.append((optimizers_hold, index))

    def apply(self, state: Any, *, with_settings: bool = True) -> None:
        self.steps.append("host state" if with_settings else "host state without settings")

    def go_back_to(self, version: Version) -> bool:
        if self.trained:
            self.steps.append("replay batches")
        return self.trained

    def restore(self, **options: Any) -> list[str]:
        """Put the version into the rank; returns the steps."""
        assert self.procedure.apply(cast("Any", self.restoration), **options) == VERSION
        assert self.boundaries.last == VERSION
        return self.steps


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Leave Lightning out; returns with which `afresh` the progress bar was shown."""
    values: list[bool] = []
    monkeypatch.setattr(progress_bar, "show_position", lambda _, *, afresh: values.append(afresh))
    monkeypatch.setattr(restore_procedure, "move_data_to", lambda loops, _: loops.move_data())
    return values


def test_a_new_process_runs_its_start_hooks_with_the_tensors_in_place(shown: list[bool]) -> None:
    rank = Rank(trained=False)
    steps = rank.restore(survivor=False, start_hooks=lambda: rank.steps.append("start hooks"))
    assert steps == [*BEFORE, *HOOKS, *MAKE, *MOVE, "resume"]
    assert (rank.holds, shown) == ([(False, None)], [True])


def test_start_hooks_that_make_modules_of_callbacks_are_called_first(shown: list[bool]) -> None:
    rank = Rank(trained=False)
    rank.lacks_modules = True
    steps = rank.restore(survivor=False, start_hooks=lambda: rank.steps.append("start hooks"))
    assert steps == ["start hooks", *BEFORE, *MAKE, *MOVE, "resume"]


def test_a_replacement_has_run_its_start_hooks_before(shown: list[bool]) -> None:
    rank = Rank(trained=False)
    assert rank.restore(survivor=False) == [*BEFORE, *MAKE, *MOVE, "resume"]
    assert (rank.holds, shown) == ([(False, None)], [True])


def test_a_survivor_keeps_what_it_has(shown: list[bool]) -> None:
    rank = Rank(trained=True)
    assert rank.restore(survivor=True) == [*BEFORE, *MAKE, *REPLAY, "resume"]
    assert (rank.holds, shown) == ([(True, "index")], [False])


def test_nothing_local_is_kept_after_a_change_of_ranks() -> None:
    rank = Rank(trained=True)
    assert rank.restore(survivor=True, moved=True) == [*BEFORE, *MAKE, "reopen", *MOVE, "resume"]
    assert rank.holds == [(False, "index")]


def test_data_opened_for_another_number_of_virtual_ranks_is_reopened() -> None:
    rank = Rank(trained=False, opened_for=3)
    assert rank.restore(survivor=False) == [*BEFORE, *MAKE, "reopen training data", *MOVE, "resume"]
