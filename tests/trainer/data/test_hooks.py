"""Dataloader hooks in a new process see the same inputs as when the current dataloaders were created."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.trainer.data.hooks import TRAIN, VALIDATION, DataHooks, Records, from_note, to_note
from lightning_ckptless.trainer.state.host_state import HostState
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer

EPOCHS = 4


class Notes(list[tuple[str, int, int, int, float, float]]):
    """Has its own class so that it is not part of the state."""


class Data(pl.LightningDataModule):
    """Records what its hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen = Notes()

    def _see(self, hook: str) -> Any:
        trainer = self.trainer
        assert trainer is not None
        self.calls += 1
        module: Any = trainer.lightning_module
        draw, own = float(torch.rand(())), float(torch.rand((), generator=module.generator))
        self.seen.append((hook, trainer.current_epoch, trainer.global_step, self.calls, draw, own))
        return tiny_loader()

    def train_dataloader(self) -> Any:
        return self._see("train")

    def val_dataloader(self) -> Any:
        return self._see("val")


def run(root: Path, every: int, expected: Records | None = None) -> tuple[DataHooks, Data, Any]:
    """Train. With records, act as a new process, and end before the first batch."""
    trainer = tiny_trainer(root, max_epochs=EPOCHS if expected is None else 0, reload_dataloaders_every_n_epochs=every)
    hooks, data, notes = DataHooks(trainer, FitLoops(trainer)), Data(), list[Any]()

    def begin(trainer: Any, module: Any) -> None:
        host_state = HostState(trainer)
        hooks.begin(lambda: host_state, lambda records: notes.append(to_note(records)), is_new=expected is not None)
        if expected is not None:
            hooks.expect(expected)
            hooks.make_as(expected, nullcontext)

    trainer.callbacks.append(callback(on_fit_start=begin))
    torch.manual_seed(0)
    module: Any = tiny_module()
    module.generator = torch.Generator().manual_seed(5)
    trainer.fit(module, datamodule=data)
    return hooks, data, notes


@pytest.mark.parametrize("every", [1, 2])
def test_a_new_process_calls_the_hooks_with_their_recorded_inputs(tmp_path: Path, every: int) -> None:
    hooks, data, notes = run(tmp_path, every)
    last = {hook: [seen for seen in data.seen if seen[0] == hook][-1] for hook in ("train", "val")}
    assert last["train"][1:3] == ((3, 12) if every == 1 else (2, 8))
    assert from_note(notes[-1]) == hooks.made
    _, again, _ = run(tmp_path, every, hooks.made)
    assert next(seen for seen in again.seen if seen[0] == "train") == last["train"]
    assert next(seen for seen in again.seen if seen[0] == "val") == last["val"]


def test_calls_at_the_start_of_a_run_need_no_record(tmp_path: Path) -> None:
    hooks, data, notes = run(tmp_path, 0)
    assert hooks.made == {TRAIN: None, VALIDATION: None}
    assert [seen[:3] for seen in data.seen] == [("train", 0, 0), ("val", 0, 0)]
    assert notes == []


def test_the_counters_are_restored_after_a_hook(tmp_path: Path) -> None:
    hooks, _, _ = run(tmp_path, 1)
    trainer = tiny_trainer(tmp_path, max_epochs=1, reload_dataloaders_every_n_epochs=1)
    again, found = DataHooks(trainer, FitLoops(trainer)), list[tuple[int, int]]()

    def begin(trainer: Any, module: Any) -> None:
        host_state = HostState(trainer)
        again.begin(lambda: host_state, lambda _: None, is_new=True)
        again.make_as(hooks.made, nullcontext)
        found.append((trainer.current_epoch, trainer.global_step))

    trainer.callbacks.append(callback(on_fit_start=begin))
    trainer.fit(tiny_module(), datamodule=Data())
    assert found == [(0, 0)]
