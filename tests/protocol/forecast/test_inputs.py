"""Inputs are checked before anything is simulated, and every default has its reason."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.failure_trace import read_trace
from lightning_ckptless.protocol.forecast.inputs import (
    REASONS,
    Forecastable,
    Inputs,
    forecastable,
    inputs_from,
    require_consistent,
)
from lightning_ckptless.protocol.mirror_interval import Costs, plan_interval

GIVEN: dict[str, Any] = {"nodes": 64, "step_s": 10.0, "rate": 6.5}


def made(**changes: Any) -> Forecastable:
    """The job of the usual inputs with some changes."""
    return forecastable(inputs_from(GIVEN | changes), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": None}, "nodes is missing: use --nodes 128, or --from RUN"),
        ({"step_s": None}, "step_s is missing"),
        ({"rate": None}, "no failure rate is given: use one of --preset rsc-1, --rate 6.5"),
        ({"rate": 0.0}, "rate=0: expected more than 0 failures"),
        ({"rate": -6.5}, "rate=-6.5: expected more than 0 failures"),
        ({"rate": float("nan")}, "rate=nan: expected a number"),
        ({"preset": "rsc-1"}, "preset and rate are both given"),
        ({"preset": "rsc-9", "rate": None}, "preset='rsc-9': expected one of"),
        ({"nodes": 0}, "nodes=0: expected a number greater than 0"),
        ({"nodes": 1.5}, "nodes=1.5: expected an integer"),
        ({"nodes": "many"}, "nodes='many': expected a number"),
        ({"step_s": -1.0}, "step_s=-1.0: expected a number greater than 0"),
        ({"copies": -1}, "copies=-1: expected a number of at least 0"),
        ({"copies": 64}, "copies=64 needs 65 nodes (the writer's own and 64 more), but the job has 64: set copies=63"),
        ({"copies": 16, "failure_domain": "rack"}, "copies=16 needs 17 racks"),
        ({"failure_domain": "row"}, "failure_domain='row': expected one of node, rack"),
        ({"min_nodes": 65}, "min_nodes=65: the job has only 64 nodes"),
        ({"process_share": 1.5}, "process_share=1.5: expected a share from 0 to 1"),
        ({"burst_nodes": 5}, "burst_nodes=5: expected at least 2 nodes and at most rack_nodes=4"),
        ({"repair_mean_h": 1.0}, "the mean is at least the median"),
        ({"spares": "some"}, "spares='some': expected an integer of at least 0, or 'auto'"),
        ({"mirror_every_n_steps": 0}, "mirror_every_n_steps=0: expected an integer of at least 1, or 'auto'"),
        ({"node": 3}, "unknown input 'node': did you mean 'nodes'?"),
        ({"rate": 1e9}, "which takes too long to simulate: reduce days or trials"),
        ({"in_place": "maybe"}, "in_place='maybe': expected true or false"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError) as refused:
        made(**changes)
    assert message in str(refused.value)


def test_inputs_without_effect_are_refused() -> None:
    with pytest.raises(OptionsError, match="burst_share has no effect with a trace"):
        require_consistent(["nodes", "burst_share"], trace=True)
    with pytest.raises(OptionsError, match="trace_days has no effect with no trace"):
        require_consistent(["nodes", "trace_days"], trace=False)


def test_the_interval_is_the_one_that_a_run_chooses() -> None:
    job = made(version_s=0.5, process_share=1.0).job
    costs = Costs(10.0, 0.5, 64 * 6.5e-3 / 86400, 0.3)
    assert job.choices.mirror_every_n_steps == plan_interval(costs, 0.01).interval
    assert made(version_s=0.5, mirror_every_n_steps=3).job.choices.mirror_every_n_steps == 3


def test_spares_follow_from_rate_and_repairs() -> None:
    assert made(repair_median_h=4.0, repair_mean_h=4.0).job.choices.spares == 1
    assert made(repair_median_h=0.0, repair_mean_h=0.0).job.choices.spares == 0
    assert made(spares=5).job.choices.spares == 5


def test_a_preset_brings_its_shape() -> None:
    assert made(rate=None, preset="infinitehbd").failures.gaps(64).shape == 0.62
    assert made(rate=None, preset="infinitehbd", weibull_shape=1.0).failures.gaps(64).shape == 1.0


def test_a_trace_is_a_failure_model() -> None:
    inputs = inputs_from({"nodes": 2, "step_s": 10.0})
    lines = read_trace(["0,a,node,1", "86400,b,node,1"], "t.csv")
    assert forecastable(inputs, lines).failures_text == "2 failures of a trace of 2 nodes over 2 days"


def test_every_reason_is_of_an_input_with_a_default() -> None:
    required = {"nodes", "step_s"}
    assert set(REASONS) <= set(Inputs.__dataclass_fields__) - required
