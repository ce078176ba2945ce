"""State of a callback put back into one that is alive, and into one of a new process: each the same as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.clocks import CLOCKS, ages_of, set_ages
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.own_state import own_state, set_own_state
from lightning_ckptless.trainer.state.plain_values import is_same
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_loader, tiny_module, tiny_trainer

LATER_S = 1000.0


def saved_state(owner: Any) -> Any:
    return unpack(pack(own_state(owner, ())))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the time of a recovery pass."""
    clocks = dict(CLOCKS)

    def pass_time() -> None:
        for name, clock in clocks.items():
            moved = partial(lambda clock: clock() + LATER_S, clock)
            monkeypatch.setattr(time, name, moved)
            monkeypatch.setitem(CLOCKS, name, moved)

    return pass_time


# ---------------------------------------------------------------------- clocks


def running_timer(distribution: str, elapsed_s: float, offset_s: float) -> Any:
    timer = module(distribution, "callbacks").Timer(duration={"hours": 1})
    stage = module(distribution, "trainer.states").RunningStage
    timer._offset = offset_s
    timer._start_time[stage.TRAINING] = time.monotonic() - elapsed_s
    timer._start_time[stage.VALIDATING] = time.monotonic() - 3
    timer._end_time[stage.VALIDATING] = time.monotonic() - 1
    return timer


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("is_alive", [True, False], ids=["survivor", "newcomer"])
def test_a_timer_counts_the_time_up_to_the_version_once(
    is_alive: bool, distribution: str, later: Callable[[], None]
) -> None:
    timer = running_timer(distribution, elapsed_s=50, offset_s=7)
    saved = saved_state(timer)
    later()
    restored = timer if is_alive else running_timer(distribution, elapsed_s=0, offset_s=0)
    set_own_state(restored, saved, ())
    assert 57 <= restored.time_elapsed() < 60
    assert restored.time_elapsed("validate") == pytest.approx(2, abs=0.5)
    assert restored.time_remaining() == pytest.approx(3600 - 57, abs=3)


def test_a_checkpoint_by_the_clock_is_due_when_it_was(later: Callable[[], None]) -> None:
    first = pl.callbacks.ModelCheckpoint(train_time_interval=None)
    first.on_train_start(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    first._last_time_checked -= 30  # type: ignore[operator]
    saved = saved_state(first)
    later()
    second = pl.callbacks.ModelCheckpoint()
    for restored in (first, second):
        set_own_state(restored, saved, ())
        assert restored._last_time_checked == pytest.approx(time.monotonic() - 30, abs=2)


def test_validation_by_the_clock_is_due_when_it_was(tmp_path: Path, later: Callable[[], None]) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer._train_start_time, trainer._last_val_time = time.monotonic() - 60, time.monotonic() - 20
    ages = ages_of(trainer)
    later()
    set_ages(trainer, ages)
    assert trainer._train_start_time == pytest.approx(time.monotonic() - 60, abs=2)
    assert trainer._last_val_time == pytest.approx(time.monotonic() - 20, abs=2)


# ---------------------------------------------------------------------- loading


class AddsUp(pl.Callback):
    """A state whose loading assumes that nothing was counted yet."""

    def __init__(self) -> None:
        self.count, self.is_resumed, self.loads = 0, False, [0]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads[0] += 1
        self.count += state_dict.pop("count")
        self.is_resumed = True


def test_what_attributes_tell_is_not_loaded() -> None:
    alive, new = AddsUp(), AddsUp()
    alive.count = 5
    saved = saved_state(alive)
    alive.count = 6
    for restored in (alive, new):
        set_own_state(restored, saved, ())
        assert (restored.count, restored.is_resumed, restored.loads) == (5, False, [0])


class Within(AddsUp):
    """Keeps its count where attributes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.within = SimpleNamespace(count=0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.within.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self.within.count = state_dict["count"]


def test_what_attributes_do_not_tell_is_loaded_and_leaves_no_mark_on_them() -> None:
    alive, new = Within(), Within()
    alive.within.count = 5
    saved = saved_state(alive)
    alive.within.count = 6
    for restored in (alive, new):
        set_own_state(restored, saved, ())
        assert (restored.within.count, restored.count, restored.is_resumed) == (5, 0, False)


def test_an_attribute_made_since_the_version_is_gone() -> None:
    alive = AddsUp()
    saved = saved_state(alive)
    alive.best = 3  # type: ignore[attr-defined]
    set_own_state(alive, saved, ())
    assert not hasattr(alive, "best")


# ---------------------------------------------------------------------- Lightning's own callbacks


def all_callbacks() -> list[Any]:
    made = pl.callbacks
    return [
        made.Timer(duration={"hours": 1}),
        made.ModelCheckpoint(every_n_train_steps=1, save_top_k=1, monitor="loss"),
        made.EarlyStopping("loss", patience=9),
        made.ThroughputMonitor(lambda batch: len(batch[0]), window_size=3),
        made.GradientAccumulationScheduler({0: 1}),
        made.EMAWeightAveraging(decay=0.5),
        made.LambdaCallback(on_train_start=lambda *_: None),
        made.OnExceptionCheckpoint("."),
        made.spike.SpikeDetection(rtol=1e9, finite_only=False),
    ]


def run(root: Path, functions: dict[int, Callable[[Any], None]]) -> None:
    """Train four steps; after some of them call a function."""
    pl.seed_everything(3, verbose=False)

    def after_step(trainer: Any, *_: Any) -> None:
        functions.pop(trainer.global_step, lambda _: None)(trainer)

    hooks = [*all_callbacks(), callback(on_train_batch_end=after_step)]
    options: dict[str, Any] = {"logger": True, "enable_checkpointing": True, "default_root_dir": str(root)}
    trainer = tiny_trainer(root, max_epochs=2, max_steps=5, callbacks=hooks, **options)
    trainer.fit(tiny_module(), tiny_loader())
    assert not functions


def shown(state: Any) -> Any:
    """What a state says of callbacks, without what the clock says."""
    callbacks = [
        {key: value for key, value in one.items() if key not in ("ages", "state")}
        | {"state": {key: value for key, value in one["state"].items() if key != "time_elapsed"}}
        for one in state["callbacks"]
    ]
    return [callbacks, {name: value for name, value in state["metrics"].items() if name.startswith("callback/")}]


def test_every_callback_of_lightning_comes_back_into_a_live_one(tmp_path: Path) -> None:
    """The state of step 2 goes into the trainer that has made step 3, which then trains to its end."""
    kept: dict[str, Any] = {}

    def take(trainer: Any) -> None:
        kept["small"] = HostState(trainer)
        kept["state"] = pack(kept["small"].capture())

    def put_back(trainer: Any) -> None:
        host_state, state = kept["small"], unpack(kept["state"])
        assert not is_same(shown(unpack(pack(host_state.capture()))), shown(state))
        host_state.apply(state)
        assert is_same(shown(unpack(pack(host_state.capture()))), shown(state))

    run(tmp_path, {2: take, 3: put_back})


def test_every_callback_of_lightning_comes_back_into_a_new_one(tmp_path: Path) -> None:
    saved: list[Packed] = []
    run(tmp_path, {3: lambda trainer: saved.append(pack(HostState(trainer).capture()))})

    def put(trainer: Any) -> None:
        host_state, state = HostState(trainer), unpack(saved[0])
        host_state.apply(state)
        assert is_same(shown(unpack(pack(host_state.capture()))), shown(state))

    run(tmp_path, {1: put})


def test_a_stand_in_that_answers_to_every_name_has_no_state() -> None:
    stand_in = Mock(spec=pl.Callback)
    saved = saved_state(stand_in)
    assert saved["state"] == {}
    set_own_state(stand_in, saved, ())
    stand_in.load_state_dict.assert_not_called()
