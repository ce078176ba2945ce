"""The forecast of a job: simulation, closed form, the effect of bursts, the recommendation, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_ckptless.protocol.forecast.coverage import Coverage
from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_DAY, FailureModel, Incident
from lightning_ckptless.protocol.forecast.failure_trace import FailureTrace
from lightning_ckptless.protocol.forecast.inputs import Forecastable
from lightning_ckptless.protocol.forecast.job import Failures, Job
from lightning_ckptless.protocol.forecast.recommendation import Recommendation, recommend
from lightning_ckptless.protocol.forecast.renewal import ClosedForm, closed_form
from lightning_ckptless.protocol.forecast.schemes import Comparison, compare_schemes
from lightning_ckptless.protocol.forecast.simulation import simulate
from lightning_ckptless.protocol.forecast.summary import Summary, summarize

_INCIDENTS_PER_CANDIDATE = 5000
Tick = Callable[[str, int | None], None]
"""Called with what is simulated and in how many pieces, if that is known, after each piece."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a job.

    Args:
        job: the job.
        expected: simulated jobs with the given options.
        independent: the same with independent failures at the same rate.
        closed: the closed form.
        recommendation: recommended options; None if not asked for.
        recommended: simulated jobs with all recommended options; None if not asked for.
        comparison: this and other schemes over the size of the cluster.
    """

    job: Job
    expected: Summary
    independent: Summary
    closed: ClosedForm
    recommendation: Recommendation | None
    recommended: Summary | None
    comparison: Comparison


def forecast(what: Forecastable, generator: np.random.Generator, tick: Tick, *, alternatives: bool) -> Forecast:
    """Forecast a job.

    Args:
        what: checked inputs.
        generator: source of randomness.
        tick: called after each job and each candidate.
        alternatives: whether to recommend options.
    """
    job, failures, horizon_s = what.job, what.failures, what.inputs.days * SECONDS_PER_DAY
    is_trace = isinstance(failures, FailureTrace)
    jobs = [_draw(failures, job, generator, horizon_s) for _ in range(what.inputs.trials)]
    apart = _independent(failures, job)
    separate = [_draw(apart, job, generator, horizon_s) for _ in range(what.inputs.trials)]
    bursts = any(len(incident.nodes) > 1 for incidents in jobs for incident in incidents)
    expected = _simulated(job, jobs, horizon_s, tick, "the given options")
    recommendation = recommended = None
    if alternatives:
        per_job = max(1.0, sum(map(len, jobs)) / len(jobs))
        few = jobs[: max(3, int(_INCIDENTS_PER_CANDIDATE / per_job))]
        recommendation = recommend(job, failures, few, horizon_s, lambda: tick("alternatives", None))
        best = replace(job, choices=recommendation.choices)
        recommended = _simulated(best, jobs, horizon_s, tick, "the recommended options")
    return Forecast(
        job=job,
        expected=expected,
        independent=_simulated(job, separate, horizon_s, tick, "independent failures"),
        closed=closed_form(job, failures, bursts=bursts, trace=is_trace),
        recommendation=recommendation,
        recommended=recommended,
        comparison=compare_schemes(job, failures),
    )


def _draw(failures: Failures, job: Job, generator: np.random.Generator, horizon_s: float) -> list[Incident]:
    return failures.draw(generator, job.cluster.nodes, job.cluster.rack_nodes, horizon_s)


def _simulated(job: Job, jobs: Sequence[Sequence[Incident]], horizon_s: float, tick: Tick, of: str) -> Summary:
    coverage, outcomes = Coverage(job.cluster, job.choices), []
    for incidents in jobs:
        outcomes.append(simulate(job, incidents, horizon_s, coverage))
        tick(of, len(jobs))
    return summarize(outcomes)


def _independent(failures: Failures, job: Job) -> FailureModel:
    """Failures of as many processes and nodes, one at a time, with exponential gaps."""
    if isinstance(failures, FailureModel):
        return replace(failures, burst_share=0.0, shape=1.0)
    nodes = job.cluster.nodes
    per_node_s = 1 / (failures.gaps(nodes).mean_s * nodes)
    return FailureModel(per_node_s, failures.repair, process_share=failures.process_share)
