"""The simulation replays incidents by the rules of the protocol: every second is accounted for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.protocol.forecast.failure_model import FailureModel, Incident, Repair
from lightning_ckptless.protocol.forecast.simulation import Bucket, Outcome, simulate
from tests.protocol.forecast.jobs import job_of


def process(at_s: float) -> Incident:
    """The loss of a process."""
    return Incident(at_s, (), ())


def node(at_s: float, *nodes: int, repair_s: float = 1000.0) -> Incident:
    """The loss of nodes."""
    return Incident(at_s, nodes, (repair_s,) * len(nodes))


def spent(outcome: Outcome) -> dict[str, Any]:
    """The buckets that have any time."""
    return {str(bucket): pytest.approx(seconds) for bucket, seconds in outcome.spent_s.items() if seconds}


def test_a_process_is_replaced_and_its_step_replayed() -> None:
    outcome = simulate(job_of(), [process(104.0)], 206.0)
    assert spent(outcome) == {"training": 200.0, "recovery": 2.0, "replay": 4.0}
    assert outcome.ettr == pytest.approx(200 / 206)
    assert outcome.incidents == 1


@pytest.mark.parametrize(
    ("changes", "recovery_s"),
    [({}, 2.0), ({"standbys": 1}, 1.0), ({"in_place": False}, 20.0), ({"in_place": False, "standbys": 1}, 20.0)],
)
def test_the_recovery_of_a_process_depends_on_the_options(changes: dict[str, Any], recovery_s: float) -> None:
    assert simulate(job_of(**changes), [process(104.0)], 300.0).spent_s[Bucket.RECOVERY] == recovery_s


def test_a_failure_during_a_recovery_starts_it_again() -> None:
    outcome = simulate(job_of(in_place_s=10.0), [process(100.0), process(107.0)], 217.0)
    assert spent(outcome) == {"training": 200.0, "recovery": 17.0}


def test_two_recoveries_in_place_without_a_step_lead_to_a_relaunch() -> None:
    outcome = simulate(job_of(), [process(100.0), process(105.0), process(110.0)], 300.0)
    # 2 s, 3 s of a step, 2 s, 3 s of a step; then both tries are used up.
    assert outcome.spent_s[Bucket.RECOVERY] == 2.0 + 2.0 + 20.0
    assert outcome.spent_s[Bucket.REPLAY] == 3.0 + 3.0


def test_a_spare_replaces_a_node_and_the_repaired_node_becomes_a_spare() -> None:
    incidents = [node(100.0, 1, repair_s=200.0), node(400.0, 2, repair_s=1000.0)]
    outcome = simulate(job_of(spares=1), incidents, 560.0)
    assert spent(outcome) == {"training": 500.0, "recovery": 60.0}


def test_without_a_spare_the_job_waits_for_a_repair() -> None:
    outcome = simulate(job_of(), [node(100.0, 1, repair_s=200.0)], 430.0)
    assert spent(outcome) == {"training": 200.0, "recovery": 30.0, "node_wait": 200.0}


def test_a_job_of_one_node_ends_while_it_waits_for_its_repair() -> None:
    outcome = simulate(job_of(1), [node(100.0, 0, repair_s=5000.0)], 400.0)
    # Nothing is left of its state, so what it had done is lost.
    assert spent(outcome) == {"replay": 100.0, "node_wait": 300.0}


def test_an_elastic_job_continues_on_fewer_nodes_and_grows_back() -> None:
    outcome = simulate(job_of(8, min_nodes=7), [node(100.0, 1, repair_s=115.0)], 318.0)
    # Seven of eight nodes train for 100 s, as much as eight in 87.5 s.
    assert spent(outcome) == {
        "training": 100.0 + 87.5 + 100.0,
        "fewer_nodes": 12.5,
        "recovery": 15.0,
        "elastic_transition": 3.0,
    }


def test_below_the_smallest_size_an_elastic_job_waits() -> None:
    incidents = [node(100.0, 1, repair_s=5000.0), node(200.0, 3, repair_s=100.0)]
    outcome = simulate(job_of(8, min_nodes=7), incidents, 400.0)
    assert outcome.spent_s[Bucket.NODE_WAIT] == 100.0


def test_a_failure_of_an_absent_node_has_no_effect() -> None:
    incidents = [node(100.0, 1, repair_s=5000.0), node(200.0, 1)]
    assert simulate(job_of(8, min_nodes=7), incidents, 400.0).incidents == 1


def test_losing_both_copies_leads_to_the_newest_durable_state() -> None:
    job = job_of(spares=2, durable_every_s=60.0)
    outcome = simulate(job, [node(107.0, 0, 1)], 300.0)
    # Ten versions exist, the durable state has six. Relaunch and restore take 120 s.
    assert outcome.spent_s[Bucket.REPLAY] == pytest.approx(47.0)
    assert outcome.spent_s[Bucket.RECOVERY] == 120.0
    assert (outcome.uncovered, outcome.first_uncovered_s) == (1, 107.0)
    assert outcome.spent_s[Bucket.TRAINING] == pytest.approx(60.0 + 73.0)


def test_without_a_durable_state_the_job_starts_again() -> None:
    assert simulate(job_of(spares=2), [node(107.0, 0, 1)], 300.0).spent_s[Bucket.REPLAY] == 107.0


def test_copies_in_another_rack_cover_the_same_loss() -> None:
    outcome = simulate(job_of(spares=2, failure_domain="rack"), [node(107.0, 0, 1)], 300.0)
    assert outcome.uncovered == 0 and outcome.first_uncovered_s is None
    assert outcome.spent_s[Bucket.REPLAY] == pytest.approx(7.0)


@pytest.mark.parametrize(("second_s", "uncovered"), [(109.0, 1), (141.0, 0)])
def test_a_lost_copy_is_back_with_the_next_version(second_s: float, uncovered: int) -> None:
    """The node is lost at 100 s and replaced by 130 s; the next version exists at 140 s."""
    incidents = [node(100.0, 0), node(second_s, 1)]
    assert simulate(job_of(spares=2), incidents, 300.0).uncovered == uncovered


def test_durable_states_delay_training() -> None:
    outcome = simulate(job_of(durable_every_s=50.0, durable_stall_s=5.0), [], 110.0)
    assert spent(outcome) == {"training": 100.0, "checkpoint_wait": 10.0}


def test_a_step_waits_for_its_data() -> None:
    outcome = simulate(job_of(data_wait_s=1.0, version_s=0.5), [process(117.0)], 230.0)
    # Ten steps of 11.5 s, then 2 s without a version; the recovery takes 2 s, and 111 s are left for 9.65 steps.
    assert outcome.spent_s[Bucket.REPLAY] == pytest.approx(2.0)
    assert outcome.spent_s[Bucket.DATA_WAIT] == pytest.approx(10.0 + 111.0 / 11.5)
    assert outcome.spent_s[Bucket.TRAINING] == pytest.approx(10 * outcome.spent_s[Bucket.DATA_WAIT])


@given(
    seed=st.integers(0, 1000),
    spares=st.integers(0, 3),
    min_nodes=st.integers(1, 12),
    copies=st.integers(0, 2),
    domain=st.sampled_from(["node", "rack"]),
    durable_every_s=st.sampled_from([None, 300.0]),
    burst_share=st.floats(0.0, 1.0),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_the_buckets_sum_to_the_wall_time(
    seed: int,
    spares: int,
    min_nodes: int,
    copies: int,
    domain: str,
    durable_every_s: float | None,
    burst_share: float,
) -> None:
    job = job_of(
        12,
        min_nodes=min_nodes,
        spares=spares,
        copies=copies,
        failure_domain=domain,
        durable_every_s=durable_every_s,
        durable_stall_s=2.0,
        version_s=0.5,
        data_wait_s=0.2,
    )
    failures = FailureModel(1 / 5000, Repair(300.0, 900.0), 0.7, 0.3, burst_share, 3)
    horizon_s = 20_000.0
    outcome = simulate(job, failures.draw(np.random.default_rng(seed), 12, 4, horizon_s), horizon_s)
    assert outcome.wall_s == pytest.approx(horizon_s)
    assert min(outcome.spent_s.values()) >= -1e-6
    assert 0 <= outcome.ettr <= 1
