"""State that users keep in unusual places continues exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lab import parts
from tests.trainer.interrupted import interrupted, run

OPTIONS = replace(parts.Options(), samples=16, epochs=2, scheduler="none")


class Counting(nn.Module):
    """A layer whose output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.uses, self.history = 0, list[float]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        self.history.append(float(x.detach().sum()))
        return x * (1 + 0.01 * self.uses) + 1e-4 * sum(self.history)


class Habits:
    """One model per habit, each derived from the lab's model."""

    @staticmethod
    def counter_in_a_layer(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.body.append(Counting())

        return Habit

    @staticmethod
    def rising_dropout(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.body[3].p = min(0.8, self.body[3].p + 0.05)

        return Habit

    @staticmethod
    def layer_frozen_in_training(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                if self.global_step == 2:
                    self.head.weight.requires_grad_(False)

        return Habit

    @staticmethod
    def layer_unfrozen_in_training(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.head.requires_grad_(False)

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                if self.global_step == 2:
                    self.head.requires_grad_(True)

        return Habit

    @staticmethod
    def buffer_created_in_training(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            mean_loss: Any

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("mean_loss", None)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                self.mean_loss = loss.detach() if self.mean_loss is None else (self.mean_loss + loss.detach()) / 2
                return loss * (1 + self.mean_loss)

        return Habit

    @staticmethod
    def hidden_state(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            hidden: torch.Tensor | None = None

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                before, self.hidden = self.hidden, loss.detach()
                return loss if before is None else loss * (1 + before)

        return Habit

    @staticmethod
    def generator_created_on_first_use(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            noise: torch.Generator | None = None

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.noise is None:
                    self.noise = torch.Generator().manual_seed(3)
                return super().training_step(batch, batch_idx) * (1 + torch.rand((), generator=self.noise))

        return Habit

    @staticmethod
    def parameter_outside_the_model(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.temperature = torch.ones((), requires_grad=True)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch, batch_idx) * self.temperature

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW([*self.parameters(), self.temperature], 1e-2)

        return Habit

    @staticmethod
    def spectral_norm(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            head: Any

            def __init__(self) -> None:
                super().__init__()
                self.head = nn.utils.parametrizations.spectral_norm(self.head)

        return Habit

    @staticmethod
    def lbfgs(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)

        return Habit

    @staticmethod
    def sequential_schedulers(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                optimizer, make = torch.optim.AdamW(self.parameters(), 1e-2), torch.optim.lr_scheduler
                parts = [make.LinearLR(optimizer, 0.1, total_iters=3), make.CosineAnnealingLR(optimizer, 9)]
                scheduler = make.SequentialLR(optimizer, parts, [3])
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return Habit

    @staticmethod
    def one_cycle(model: Any) -> Any:
        class Habit(model):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), 1e-2, momentum=0.9)
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return Habit


HABITS = [name for name in vars(Habits) if not name.startswith("_")]


@pytest.mark.parametrize("habit", HABITS)
def test_the_run_continues_exactly(habit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class = parts.model_class
    monkeypatch.setattr(parts, "model_class", lambda *args: getattr(Habits, habit)(model_class(*args)))
    whole, _ = run(OPTIONS, tmp_path / "whole")
    joined = interrupted(OPTIONS, tmp_path / "joined", whole.versions[5])
    assert joined.rows == whole.rows
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, joined.weights[name]), name
