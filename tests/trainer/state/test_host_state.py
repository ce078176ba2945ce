"""The host state of one trainer is applied to another one built in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.trainer.state.host_state import HostState
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer

Look = Callable[[Any], None]


class Opaque:
    """Not plain data: saved only by the hooks of its owner."""

    def __init__(self) -> None:
        self.value = 0


class Remembering(pl.Callback):
    """Keeps one value in its `state_dict`, one as a plain attribute, and one that is not part of the state."""

    def __init__(self) -> None:
        self.opaque, self.count, self.lock = Opaque(), 0, object()

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.opaque.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.opaque.value = state_dict["value"]


class Extra(nn.Module):
    """Keeps a value that only `get_extra_state` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque = Opaque()

    def get_extra_state(self) -> int:
        return self.opaque.value

    def set_extra_state(self, state: int) -> None:
        self.opaque.value = state


class Data(pl.LightningDataModule):
    """Ascending rows, and its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque, self.passes = Opaque(), 0

    def train_dataloader(self) -> Any:
        return tiny_loader()

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.opaque.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.opaque.value = state_dict["value"]


def small_module() -> Any:
    module = tiny_module()
    module.norm, module.extra, module.mean = nn.BatchNorm1d(2), Extra(), torchmetrics.MeanMetric()
    module.rows = []
    return module


def at_first_step(root: Path, look: Look, module: Any = None, callbacks: tuple[Any, ...] = ()) -> Any:
    """Train one step, and inspect the trainer after it."""
    hooks = callback(on_train_batch_end=lambda trainer, *_: look(trainer))
    trainer = tiny_trainer(root, max_steps=1, callbacks=[*callbacks, hooks])
    trainer.fit(small_module() if module is None else module, datamodule=Data())
    return trainer


def captured(root: Path, change: Look, **parts: Any) -> Any:
    """Return the host state after a step and a change."""
    saved: list[Packed] = []

    def look(trainer: Any) -> None:
        host_state = HostState(trainer)
        change(trainer)
        saved.append(pack(host_state.capture()))

    at_first_step(root, look, **parts)
    return unpack(saved[0])


def applied(root: Path, saved: Any, check: Look, **parts: Any) -> None:
    """Apply a host state to another trainer, and inspect that one."""

    def look(trainer: Any) -> None:
        HostState(trainer).apply(saved)
        check(trainer)

    at_first_step(root, look, **parts)


def nothing(trainer: Any) -> None:
    """Leave the trainer as it is."""


def test_callbacks_are_restored_from_state_dict_and_attributes(tmp_path: Path) -> None:
    first, second = Remembering(), Remembering()
    lock = second.lock

    def change(_: Any) -> None:
        first.opaque.value, first.count = 3, 4

    saved = captured(tmp_path, change, callbacks=(first,))
    applied(tmp_path, saved, nothing, callbacks=(second,))
    assert (second.opaque.value, second.count) == (3, 4)
    assert second.lock is lock


def test_process_attributes_of_a_timer_are_not_restored(tmp_path: Path) -> None:
    first, second = pl.callbacks.Timer(duration={"hours": 1}), pl.callbacks.Timer(duration={"hours": 2})
    saved = captured(tmp_path, nothing, callbacks=(first,))
    assert saved["callbacks"][0]["plain"] == {"_offset": 0}
    applied(tmp_path, saved, nothing, callbacks=(second,))
    assert second._duration == 7200


def test_the_module_is_restored(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        module = trainer.lightning_module
        module.rows.append(torch.ones(2))
        module.norm.eval()
        module.extra.opaque.value = 5
        module.mean.update(4.0)

    def check(trainer: Any) -> None:
        module = trainer.lightning_module
        assert [row.tolist() for row in module.rows] == [[1.0, 1.0]]
        assert (module.training, module.norm.training, module.layer.training) == (True, False, True)
        assert module.extra.opaque.value == 5
        assert module.mean.compute() == 4.0
        module.mean.reset()

    applied(tmp_path, captured(tmp_path, change), check)


def test_the_datamodule_is_restored(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        trainer.datamodule.opaque.value, trainer.datamodule.passes = 6, 7

    def check(trainer: Any) -> None:
        assert (trainer.datamodule.opaque.value, trainer.datamodule.passes) == (6, 7)

    applied(tmp_path, captured(tmp_path, change), check)


def test_a_stop_request_is_restored(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        trainer.should_stop = True

    def check(trainer: Any) -> None:
        assert trainer.should_stop

    applied(tmp_path, captured(tmp_path, change), check)


def test_a_skipped_validation_is_restored(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        trainer.fit_loop.epoch_loop._skip_next_val = True

    def check(trainer: Any) -> None:
        assert trainer.fit_loop.epoch_loop._skip_next_val

    applied(tmp_path, captured(tmp_path, change), check)


def test_applying_a_state_twice_gives_the_same_result(tmp_path: Path) -> None:
    """A fit applies it before and after its start hooks."""
    saved = captured(tmp_path, lambda trainer: trainer.lightning_module.rows.append(1))

    def check(trainer: Any) -> None:
        trainer.lightning_module.rows.append(2)
        HostState(trainer).apply(saved)
        assert trainer.lightning_module.rows == [1]

    applied(tmp_path, saved, check)


# ---------------------------------------------------------------------- another script


def with_another_metric() -> Any:
    module = small_module()
    module.other = torchmetrics.SumMetric()
    return module


def with_another_layer() -> Any:
    module = small_module()
    module.other = nn.Linear(1, 1)
    return module


def with_a_scheduler() -> Any:
    module = small_module()

    def configure_optimizers() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module.configure_optimizers = configure_optimizers
    return module


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("callbacks", lambda: {"callbacks": (Remembering(),)}),
        ("modules", lambda: {"module": with_another_layer()}),
        ("metrics|modules", lambda: {"module": with_another_metric()}),
        ("schedulers", lambda: {"module": with_a_scheduler()}),
    ],
)
def test_a_script_that_builds_something_different_is_rejected(kind: str, parts: Any, tmp_path: Path) -> None:
    saved = captured(tmp_path, nothing)
    with pytest.raises(LayoutMismatchError, match=rf"({kind}) .*build the same trainer and model at every start"):
        applied(tmp_path, saved, nothing, **parts())
