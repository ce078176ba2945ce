"""Metrics of lost ranks are merged into those of a remaining rank, as if it had seen their samples itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics

from lightning_ckptless.internals.lightning.metrics import defaults_of, dump_metric, load_metric, reductions_of
from lightning_ckptless.trainer.state.metric_merging import clear, discard_computed, merge

METRICS = {
    "mean": torchmetrics.MeanMetric,
    "sum": torchmetrics.SumMetric,
    "max": torchmetrics.MaxMetric,
    "min": torchmetrics.MinMetric,
    "cat": torchmetrics.CatMetric,
}
MINE, THEIRS = (2.0, 8.0), (5.0, 1.0)


def host_state(metrics: dict[str, Any], logged: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make a host state that contains only metrics and logged values."""
    items = {"training": {"items": logged or {}}, "validation": {"items": {}}}
    return {"results": items, "metrics": {name: dump_metric(metric) for name, metric in metrics.items()}}


def updated(kind: str, values: tuple[float, ...]) -> Any:
    metric = METRICS[kind]()
    for value in values:
        metric.update(value)
    return metric


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize(("mine", "theirs"), [(MINE, THEIRS), ((), THEIRS), (MINE, ())], ids=["both", "new", "alone"])
def test_a_merged_metric_covers_the_samples_of_both_ranks(
    kind: str, mine: tuple[float, ...], theirs: tuple[float, ...]
) -> None:
    metric = updated(kind, mine)
    state = host_state({"m": metric})
    merge(state, host_state({"m": updated(kind, theirs)}), {"m": reductions_of(metric)})
    load_metric(metric, state["metrics"]["m"])
    assert torch.equal(metric.compute(), updated(kind, (*mine, *theirs)).compute())


def test_a_state_without_a_reduction_is_named_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    state = host_state({"m": updated("sum", MINE)})
    merge(state, host_state({"m": updated("sum", THEIRS)}), {"m": {"sum_value": None}})
    assert "m.sum_value has no known reduction over ranks" in caplog.text
    assert float(state["metrics"]["m"]["states"]["sum_value"]) == sum(MINE)


def logged(reduce: str, value: float, samples: int, *, reset: bool = False) -> dict[str, Any]:
    item = {"is_tensor": True, "reduce_fx": reduce, "value": torch.tensor(value), "has_reset": reset, "update_count": 1}
    return item | ({"cumulated_batch_size": torch.tensor(samples)} if reduce == "mean" else {})


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 12.0), ("sum", 12.0), ("max", 8.0), ("min", 4.0)])
def test_logged_values_are_merged_by_their_reduction(reduce: str, expected: float) -> None:
    state = host_state({}, {"x": logged(reduce, 4.0, 3)})
    merge(state, host_state({}, {"x": logged(reduce, 8.0, 2), "y": logged(reduce, 1.0, 1)}), {})
    items = state["results"]["training"]["items"]
    assert float(items["x"]["value"]) == expected
    assert float(items["y"]["value"]) == 1.0
    if reduce == "mean":
        assert int(items["x"]["cumulated_batch_size"]) == 5


@pytest.mark.parametrize(("mine_reset", "theirs_reset", "expected"), [(True, False, 8.0), (False, True, 4.0)])
def test_a_value_that_was_reset_adds_nothing(mine_reset: bool, theirs_reset: bool, expected: float) -> None:
    state = host_state({}, {"x": logged("mean", 4.0, 3, reset=mine_reset)})
    merge(state, host_state({}, {"x": logged("mean", 8.0, 2, reset=theirs_reset)}), {})
    assert float(state["results"]["training"]["items"]["x"]["value"]) == expected


def test_a_new_rank_starts_with_empty_metrics() -> None:
    metric = updated("sum", MINE)
    state = host_state({"m": metric}, {"x": logged("mean", 4.0, 3)})
    clear(state, {"m": defaults_of(metric)})
    load_metric(metric, state["metrics"]["m"])
    metric.update(3.0)
    assert float(metric.compute()) == 3.0


@pytest.mark.parametrize(("reduce", "value"), [("mean", 4.0), ("sum", 4.0), ("max", -4.0), ("min", 4.0)])
def test_a_new_rank_adds_nothing_to_a_logged_value(reduce: str, value: float) -> None:
    """It still has the value: all ranks must reduce the same values at the end of the epoch."""
    new, old = (host_state({}, {"x": logged(reduce, value, 3)}) for _ in range(2))
    clear(new, {})
    merge(new, old, {})
    (found, expected) = (state["results"]["training"]["items"]["x"] for state in (new, old))
    assert torch.equal(found["value"], expected["value"])
    assert found.get("cumulated_batch_size") == expected.get("cumulated_batch_size")


def test_cached_results_are_discarded() -> None:
    metric = updated("sum", MINE)
    metric.compute()
    state = host_state({"m": metric}, {"x": logged("mean", 4.0, 3) | {"computed": torch.tensor(4.0)}})
    discard_computed(state)
    assert state["metrics"]["m"]["computed"] is None
    assert state["results"]["training"]["items"]["x"]["computed"] is None
