"""A trace records every point of a run and does not change the run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ckptless.lightning_pytorch import StepTrace
from lightning_ckptless.testing.compare import compare_traces
from lightning_ckptless.testing.digest import digest_values
from lightning_ckptless.testing.trace import (
    generators,
    optimizer_state,
    relative_paths,
)
from lightning_ckptless.testing.trace_reader import Trace, read_traces
from tests.lab.parts import Options
from tests.testing.runs import BASE, fit


def traced(options: Options, root: Path) -> Trace:
    fit(options, root, StepTrace(root / "trace"))
    (trace,) = read_traces(root / "trace").values()
    return trace


def test_every_batch_validation_and_epoch_is_recorded(tmp_path: Path) -> None:
    trace = traced(replace(BASE, accumulate=2), tmp_path)
    places = [(line.point.kind, line.point.epoch, line.point.batch, line.point.step) for line in trace.lines]
    first = [("batch", 0, number, (number + 1) // 2) for number in range(6)]
    second = [("batch", 1, number, 3 + (number + 1) // 2) for number in range(6)]
    assert places == [
        *first,
        ("validation", 0, -1, 3),
        ("epoch", 0, -1, 3),
        *second,
        ("validation", 1, -1, 6),
        ("epoch", 1, -1, 6),
        ("end", 2, -1, 6),
    ]
    assert trace.loggers == [("CSVLogger", tmp_path / "lightning_logs" / "version_0")]


def test_all_parts_of_the_state_are_recorded(tmp_path: Path) -> None:
    trace = traced(replace(BASE, early_stopping=True, checkpoint_every=4), tmp_path)
    batch, end = trace.lines[0].facts, trace.lines[-1].facts
    tensors = {"parameter head.weight", "buffer body.1.running_mean", "optimizer 0 head.weight", "optimizer 0 group 0"}
    rng = {"python_rng", "numpy_rng", "torch_rng"}
    assert set(batch) >= {"batch", "lr[0][0]", "loss", "loss_step", *tensors, *rng}
    assert set(end) >= {"loops", "schedulers", "precision", "loss_epoch", "accuracy", "val_loss", *tensors, *rng}
    assert {name.partition("(")[2] for name in end if name.startswith("callback")} >= {
        "EarlyStopping)",
        "ModelCheckpoint)",
    }


def test_equal_runs_are_identical_and_another_seed_differs(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        traced(replace(BASE, seed=seed, early_stopping=True, checkpoint_every=4), tmp_path / name)
    assert compare_traces(tmp_path / "a" / "trace", tmp_path / "b" / "trace").identical
    first = compare_traces(tmp_path / "a" / "trace", tmp_path / "c" / "trace").first
    assert first is not None
    assert first.step == 1


@pytest.mark.parametrize("options", [BASE, replace(BASE, ema=True), replace(BASE, optimization="two")], ids=str)
def test_tracing_does_not_change_the_run(options: Options, tmp_path: Path) -> None:
    _, plain = fit(options, tmp_path / "plain")
    after_plain = generators()
    _, watched = fit(options, tmp_path / "watched", StepTrace(tmp_path / "trace"))
    assert generators() == after_plain
    assert digest_values(plain.state_dict()) == digest_values(watched.state_dict())
    rows = [path.read_text() for path in sorted(tmp_path.rglob("metrics.csv"))]
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_generators_are_distinguished() -> None:
    before = generators()
    draws: dict[str, Callable[[], object]] = {
        "python_rng": random.random,
        "numpy_rng": np.random.rand,
        "torch_rng": lambda: torch.rand(1),
    }
    for name, draw in draws.items():
        draw()
        now = generators()
        assert {n for n in now if now[n] != before[n]} == {name}
        before = now


def test_optimizer_state_and_settings_are_digested() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    found = [optimizer_state(optimizer, {id(parameter): "weight"})]
    optimizer.param_groups[0]["weight_decay"] = 0.5
    found.append(optimizer_state(optimizer, {id(parameter): "weight"}))
    optimizer.state[parameter]["exp_avg"][0] += 1e-7
    found.append(optimizer_state(optimizer, {id(parameter): "weight"}))
    settings, state = zip(*((each["group 0"], each["weight"]) for each in found), strict=True)
    assert len({settings[0], settings[1]}) == 2 and settings[1] == settings[2]
    assert len({state[1], state[2]}) == 2 and state[0] == state[1]


def test_paths_do_not_depend_on_the_folder_of_the_run() -> None:
    state = {
        "best": "/a/version_1/checkpoints/epoch=1-v1.ckpt",
        "elsewhere": "/b/checkpoints/last-v2.ckpt",
        "k": {"/a/version_1/x.ckpt": torch.tensor(1.0)},
        "dir": "/a/version_1",
        "monitor": "val_loss",
    }
    assert relative_paths(state, ["/a/version_1"]) == {
        "best": "checkpoints/epoch=1-v1.ckpt",
        "elsewhere": "last.ckpt",
        "k": {"x.ckpt": torch.tensor(1.0)},
        "dir": ".",
        "monitor": "val_loss",
    }


def test_the_folder_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CKPTLESS_TRACE_DIR", raising=False)
    assert StepTrace.from_environment() is None
    monkeypatch.setenv("CKPTLESS_TRACE_DIR", str(tmp_path))
    assert type(StepTrace.from_environment()) is StepTrace
