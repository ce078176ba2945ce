"""The state of a callback is restored exactly, in a survivor and in a new process."""

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
from lightning_ckptless.trainer.state.own_state import OwnState
from lightning_ckptless.trainer.state.plain_values import is_same
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_loader, tiny_module, tiny_trainer

LATER_S = 1000.0


def saved_state(owner: Any) -> Any:
    return unpack(pack(OwnState(owner, ()).capture()))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Advances the clocks by the duration of a recovery."""
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
@pytest.mark.parametrize("is_alive", [True, False], ids=["survivor", "replacement"])
def test_a_restored_timer_excludes_the_time_after_the_version(
    is_alive: bool, distribution: str, later: Callable[[], None]
) -> None:
    timer = running_timer(distribution, elapsed_s=50, offset_s=7)
    saved = saved_state(timer)
    later()
    restored = timer if is_alive else running_timer(distribution, elapsed_s=0, offset_s=0)
    OwnState(restored, ()).put(saved)
    assert 57 <= restored.time_elapsed() < 60
    assert restored.time_elapsed("validate") == pytest.approx(2, abs=0.5)
    assert restored.time_remaining() == pytest.approx(3600 - 57, abs=3)


def test_a_timed_checkpoint_is_due_after_the_same_training_time(later: Callable[[], None]) -> None:
    first = pl.callbacks.ModelCheckpoint(train_time_interval=None)
    first.on_train_start(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    first._last_time_checked -= 30  # type: ignore[operator]
    saved = saved_state(first)
    later()
    second = pl.callbacks.ModelCheckpoint()
    for restored in (first, second):
        OwnState(restored, ()).put(saved)
        assert restored._last_time_checked == pytest.approx(time.monotonic() - 30, abs=2)


def test_a_timed_validation_is_due_after_the_same_training_time(tmp_path: Path, later: Callable[[], None]) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer._train_start_time, trainer._last_val_time = time.monotonic() - 60, time.monotonic() - 20
    ages = ages_of(trainer)
    later()
    set_ages(trainer, ages)
    assert trainer._train_start_time == pytest.approx(time.monotonic() - 60, abs=2)
    assert trainer._last_val_time == pytest.approx(time.monotonic() - 20, abs=2)


# ---------------------------------------------------------------------- loading


class AddsUp(pl.Callback):
    """Its `load_state_dict` assumes that nothing was counted yet."""

    def __init__(self) -> None:
        self.count, self.is_resumed, self.loads = 0, False, [0]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads[0] += 1
        self.count += state_dict.pop("count")
        self.is_resumed = True


def test_load_state_dict_is_not_called_if_attributes_suffice() -> None:
    alive, new = AddsUp(), AddsUp()
    alive.count = 5
    saved = saved_state(alive)
    alive.count = 6
    for restored in (alive, new):
        OwnState(restored, ()).put(saved)
        assert (restored.count, restored.is_resumed, restored.loads) == (5, False, [0])


class CountsInObject(AddsUp):
    """Keeps its count in an object that is not plain data."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = SimpleNamespace(count=0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.counter.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self.counter.count = state_dict["count"]


def test_load_state_dict_does_not_change_other_attributes() -> None:
    alive, new = CountsInObject(), CountsInObject()
    alive.counter.count = 5
    saved = saved_state(alive)
    alive.counter.count = 6
    for restored in (alive, new):
        OwnState(restored, ()).put(saved)
        assert (restored.counter.count, restored.count, restored.is_resumed) == (5, 0, False)


def test_an_attribute_created_after_the_version_is_removed() -> None:
    alive = AddsUp()
    saved = saved_state(alive)
    alive.best = 3  # type: ignore[attr-defined]
    OwnState(alive, ()).put(saved)
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
    """Train, and call functions after some of the steps."""
    pl.seed_everything(3, verbose=False)

    def after_step(trainer: Any, *_: Any) -> None:
        functions.pop(trainer.global_step, lambda _: None)(trainer)

    hooks = [*all_callbacks(), callback(on_train_batch_end=after_step)]
    options: dict[str, Any] = {"logger": True, "enable_checkpointing": True, "default_root_dir": str(root)}
    trainer = tiny_trainer(root, max_epochs=2, max_steps=5, callbacks=hooks, **options)
    trainer.fit(tiny_module(), tiny_loader())
    assert not functions


def shown(state: Any) -> Any:
    """Return the callbacks in a state, without values that depend on the clock, or on which objects were replaced."""
    callbacks = [
        {key: value for key, value in one.items() if key not in ("ages", "state", "held")}
        | {"state": {key: value for key, value in one["state"].items() if key != "time_elapsed"}}
        for one in state["callbacks"]
    ]
    return [callbacks, {name: value for name, value in state["metrics"].items() if name.startswith("callback/")}]


def test_lightnings_callbacks_are_restored_in_a_survivor(tmp_path: Path) -> None:
    """The state of step 2 is applied to the trainer after step 3, which then trains to the end."""
    kept: dict[str, Any] = {}

    def take(trainer: Any) -> None:
        kept["host_state"] = HostState(trainer)
        kept["state"] = pack(kept["host_state"].capture())

    def put_back(trainer: Any) -> None:
        host_state, state = kept["host_state"], unpack(kept["state"])
        assert not is_same(shown(unpack(pack(host_state.capture()))), shown(state))
        host_state.apply(state)
        assert is_same(shown(unpack(pack(host_state.capture()))), shown(state))

    run(tmp_path, {2: take, 3: put_back})


def test_lightnings_callbacks_are_restored_in_a_new_process(tmp_path: Path) -> None:
    saved: list[Packed] = []
    run(tmp_path, {3: lambda trainer: saved.append(pack(HostState(trainer).capture()))})

    def put(trainer: Any) -> None:
        host_state, state = HostState(trainer), unpack(saved[0])
        host_state.apply(state)
        assert is_same(shown(unpack(pack(host_state.capture()))), shown(state))

    run(tmp_path, {1: put})


def test_a_mock_has_no_state() -> None:
    stand_in = Mock(spec=pl.Callback)
    saved = saved_state(stand_in)
    assert saved["state"] == {}
    OwnState(stand_in, ()).put(saved)
    stand_in.load_state_dict.assert_not_called()
