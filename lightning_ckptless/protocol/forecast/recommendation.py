"""Which options to choose, and what each alternative would cost.

Options are chosen one after the other. The candidates of an option are simulated under the same incidents, so their
differences are not noise. They are compared by efficiency, the share of all paid node time that is productive: a spare
node costs as much as a node that trains. Of options that cost memory or storage, the cheapest candidate that is almost
as good as the best is chosen. The mirror interval is chosen by the closed form, which is exact and smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_ckptless.protocol.forecast.coverage import Coverage, domains_error
from lightning_ckptless.protocol.forecast.failure_model import Incident, spares_needed
from lightning_ckptless.protocol.forecast.job import Choices, Failures, Job
from lightning_ckptless.protocol.forecast.renewal import closed_form
from lightning_ckptless.protocol.forecast.simulation import simulate
from lightning_ckptless.protocol.forecast.summary import summarize
from lightning_ckptless.protocol.mirror_interval import INTERVALS

TOLERANCES = {"copies": 2e-4, "durable_every_s": 2e-4, "standbys": 2e-4}
"""Difference in efficiency below which the cheaper candidate is chosen. These options cost memory or storage, which the
efficiency does not contain; for the others the best candidate is chosen."""
ORDER = ("mirror_every_n_steps", "in_place", "failure_domain", "copies", "durable_every_s", "spares", "standbys")
_DURABLE_S = (86400.0, 28800.0, 14400.0, 7200.0, 3600.0, 1800.0, 600.0)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One candidate of one option, with the options before it as recommended and those after it as given.

    Args:
        option: name of the option.
        value: its value.
        ettr: expected effective training time ratio.
        efficiency: productive share of all paid node time, spares included.
        uncovered: losses per job that memory does not cover; None if only the closed form was used.
        given: whether the value is the one that was given.
        chosen: whether the value is recommended.
    """

    option: str
    value: Any
    ettr: float
    efficiency: float
    uncovered: float | None
    given: bool
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Recommended options.

    Args:
        choices: all options together.
        alternatives: every candidate that was examined.
    """

    choices: Choices
    alternatives: tuple[Alternative, ...]


def recommend(
    job: Job,
    failures: Failures,
    jobs: Sequence[Sequence[Incident]],
    horizon_s: float,
    tick: Callable[[], None],
) -> Recommendation:
    """Recommend options for a job.

    Args:
        job: the job with its given options.
        failures: failures of its nodes.
        jobs: incidents of each job to simulate.
        horizon_s: duration of a job, in seconds.
        tick: called after each candidate.
    """
    best, found = job.choices, list[Alternative]()
    for option in ORDER:
        of_option = []
        for value in candidates(option, replace(job, choices=best), failures):
            changed = replace(job, choices=replace(best, **{option: value}))
            if domains_error(job.cluster, changed.choices) is not None:
                continue
            given = value == getattr(job.choices, option)
            of_option.append(_examine(option, value, changed, failures, jobs, horizon_s, given=given))
            tick()
        top = max(alternative.efficiency for alternative in of_option)
        enough = top - TOLERANCES.get(option, 0.0)
        chosen = next(alternative for alternative in of_option if alternative.efficiency >= enough)
        best = replace(best, **{option: chosen.value})
        found += [replace(alternative, chosen=alternative is chosen) for alternative in of_option]
    return Recommendation(best, tuple(found))


def candidates(option: str, job: Job, failures: Failures) -> Iterator[Any]:
    """The values of an option to examine, the cheapest first; the given one is among them."""
    given, found = getattr(job.choices, option), list[Any]()
    if option == "mirror_every_n_steps":
        found = sorted({*INTERVALS, given})
    elif option == "in_place":
        found = [True, False]
    elif option == "failure_domain":
        found = ["node", "rack"]
    elif option == "copies":
        found = sorted({0, 1, 2, 3, given})
    elif option == "durable_every_s":
        # None comes last: the model has no failure that takes the whole cluster, but a durable state survives it.
        found = [*sorted({given, *_DURABLE_S} - {None}, reverse=True), None]
    elif option == "spares":
        usual = spares_needed(failures.node_losses_per_s(job.cluster.nodes), failures.repair)
        found = sorted({0, usual // 2, usual, usual + 1, usual + max(2, usual // 2), given})
    else:
        found = sorted({0, 1, given})
    yield from found


def _examine(
    option: str,
    value: Any,
    job: Job,
    failures: Failures,
    jobs: Sequence[Sequence[Incident]],
    horizon_s: float,
    *,
    given: bool,
) -> Alternative:
    nodes = job.cluster.nodes
    paid = nodes / (nodes + job.choices.spares)
    if option == "mirror_every_n_steps":
        ettr = closed_form(job, failures, bursts=False, trace=False).ettr
        return Alternative(option, value, ettr, ettr * paid, None, given)
    coverage = Coverage(job.cluster, job.choices)
    found = summarize([simulate(job, incidents, horizon_s, coverage) for incidents in jobs])
    return Alternative(option, value, found.ettr, found.ettr * paid, found.uncovered, given)
