"""The user's checkpoint hooks: called when Lightning calls them, and for each version only if the user asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.tensors import StateIndex
from lightning_ckptless.trainer.strategy.compatibility import check_trainer
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer

EVERY = CkptlessOptions(checkpoint_hooks="every_version")
LIGHTNING_KEYS = {
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
    "lr_schedulers",
}  # fmt: skip


class Opaque:
    """Not plain data."""

    def __init__(self) -> None:
        self.value = 0


class Counting(pl.Callback):
    """Counts the calls of its hooks, and keeps a number that only they save."""

    def __init__(self) -> None:
        self.opaque, self.saved, self.stated, self.loaded = Opaque(), 0, 0, list[set[str]]()

    def state_dict(self) -> dict[str, Any]:
        self.stated += 1
        return {"stated": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded.append({*state_dict})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.saved += 1
        checkpoint["opaque"] = self.opaque.value

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.opaque.value = checkpoint["opaque"]


def frozen_module() -> Any:
    """Make a model that leaves its bias out of its checkpoint files."""
    base: Any = type(tiny_module())

    class Frozen(base):  # type: ignore[misc]
        saved: list[set[str]] = []  # noqa: RUF012 - of the class: not part of a version
        loaded: list[dict[str, Any]] = []  # noqa: RUF012

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.saved.append({*checkpoint})
            del checkpoint["state_dict"]["layer.bias"]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded.append(checkpoint)

    return Frozen()


def at_last_step(root: Path, module: Any, counting: Counting, look: Callable[[Any], None]) -> None:
    hooks = callback(on_train_batch_end=lambda trainer, *_: look(trainer) if trainer.global_step == 4 else None)
    tiny_trainer(root, callbacks=[counting, hooks]).fit(module, tiny_loader())


def captured(root: Path, options: CkptlessOptions, module: Any, counting: Counting) -> Any:
    taken: list[Packed] = []

    def look(trainer: Any) -> None:
        taken.append(pack(HostState(trainer, options).capture(None, StateIndex(trainer).read())))

    at_last_step(root, module, counting, look)
    return unpack(taken[0])


def test_versions_call_no_hook_of_a_checkpoint(tmp_path: Path) -> None:
    module, counting = frozen_module(), Counting()
    saved = captured(tmp_path, CkptlessOptions(), module, counting)
    assert (saved["checkpoint"], counting.saved, module.saved) == (None, 0, [])


def test_every_version_hooks_save_and_load_the_checkpoint_that_lightning_would_write(tmp_path: Path) -> None:
    module, counting = frozen_module(), Counting()
    counting.opaque.value = 7
    saved = captured(tmp_path / "first", EVERY, module, counting)
    assert counting.saved == 1
    assert module.saved == [LIGHTNING_KEYS | {"opaque"}]

    fresh, other, weights = frozen_module(), Counting(), list[torch.Tensor]()

    def put_back(trainer: Any) -> None:
        HostState(trainer, EVERY).apply(saved)
        weights.append(fresh.loaded[0]["state_dict"]["layer.weight"])
        assert weights[0].data_ptr() == fresh.layer.weight.data_ptr(), "large tensors are those of the version"

    at_last_step(tmp_path / "second", fresh, other, put_back)
    assert other.opaque.value == 7
    (loaded,) = fresh.loaded
    assert {*loaded} == LIGHTNING_KEYS | {"opaque"}
    assert {*loaded["state_dict"]} == {"layer.weight"}
    assert loaded["global_step"] == 4


def test_a_checkpoint_that_cannot_be_pickled_is_rejected(tmp_path: Path) -> None:
    def on_save_checkpoint(trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = lambda: None

    hooks = callback(on_save_checkpoint=on_save_checkpoint)
    trainer = tiny_trainer(tmp_path, callbacks=[hooks])
    trainer.fit(tiny_module(), tiny_loader())
    with pytest.raises(OptionsError, match=r"cannot pickle the checkpoint of step 4: .*checkpoint_hooks='never'"):
        HostState(trainer, EVERY).capture(dict)


@pytest.mark.parametrize(("options", "told"), [(CkptlessOptions(), True), (EVERY, False)])
def test_an_object_that_only_a_hook_saves_is_reported(
    options: CkptlessOptions, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def look(trainer: Any) -> None:
        with caplog.at_level(logging.WARNING):
            HostState(trainer, options).hooks.warn_of_uncovered()

    at_last_step(tmp_path, frozen_module(), Counting(), look)
    found = [r.getMessage() for r in caplog.records if "on_save_checkpoint" in r.getMessage()]
    assert len(found) == told
    assert not told or "Counting.on_save_checkpoint saves self.opaque (Opaque), which is not part of" in found[0]


def test_the_state_dict_of_a_callback_can_be_excluded(tmp_path: Path) -> None:
    counting = Counting()
    saved = captured(tmp_path / "with", CkptlessOptions(), tiny_module(), counting)
    assert (counting.stated, saved["callbacks"][0]["state"]) == (1, {"stated": 1})

    quiet, options = Counting(), CkptlessOptions(stateless_callbacks=["Counting"])
    saved = captured(tmp_path / "without", options, tiny_module(), quiet)
    assert (quiet.stated, saved["callbacks"][0]["state"]) == (0, {})
    assert saved["callbacks"][0]["plain"]["saved"] == 0, "plain attributes are part of the version all the same"
    at_last_step(tmp_path / "again", tiny_module(), quiet, lambda t: HostState(t, options).apply(saved))
    assert quiet.loaded == []


def test_an_unknown_stateless_callback_is_rejected(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[Counting()])
    with pytest.raises(
        OptionsError, match=r"stateless_callbacks contains 'Cuonting', but the trainer's callbacks are Counting"
    ):
        check_trainer(trainer, CkptlessOptions(stateless_callbacks=("Counting", "Cuonting")))


@pytest.mark.parametrize("value", ["Counting", [3]])
def test_stateless_callbacks_must_be_a_list_of_names(value: Any) -> None:
    with pytest.raises(OptionsError, match=r"expected a list of class names"):
        CkptlessOptions(stateless_callbacks=value)
