"""The inputs of a forecast: checked before anything is simulated, each with the reason for its default."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.coverage import domains_error
from lightning_ckptless.protocol.forecast.failure_model import (
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    FailureModel,
    Repair,
    require_rate,
    spares_needed,
)
from lightning_ckptless.protocol.forecast.failure_trace import FailureTrace, TraceLine
from lightning_ckptless.protocol.forecast.job import FAILURE_DOMAINS, Choices, Cluster, Costs, Failures, Job
from lightning_ckptless.protocol.forecast.presets import BURST_SHARE, REPAIR_MEAN_H, REPAIR_MEDIAN_H, preset
from lightning_ckptless.protocol.forecast.renewal import process_recovery_s
from lightning_ckptless.protocol.mirror_interval import Costs as IntervalCosts
from lightning_ckptless.protocol.mirror_interval import plan_interval

AUTO = "auto"
_MOST_INCIDENTS = 5e6


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a forecast depends on; `None` where a value follows from others.

    Args:
        nodes: nodes that the job trains on.
        ranks_per_node: ranks on each node.
        min_nodes: fewest nodes that the job continues on; None if it is not elastic.
        rack_nodes: neighbouring nodes that share a rack.
        spares: nodes that wait to replace a lost node, or `auto` for a number that is too low 1 % of the time.
        price: price of a rank for an hour; None without money.
        state_bytes: size of the training state, in bytes; None if unknown.
        step_s: step without mirroring and without waiting for its data, in seconds.
        data_wait_s: how long a step waits for its data, in seconds.
        version_s: additional duration of a step while a version is mirrored, in seconds; None for 1 % of a step.
        mirror_every_n_steps: steps between versions, or `auto` for the interval that the run would choose.
        mirror_budget: with `auto`, the largest share by which mirroring may lengthen training.
        copies: replicas of each shard, in addition to the source rank's own copy.
        failure_domain: `node` or `rack`.
        in_place: whether survivors stay in `fit`.
        standbys: processes per node that wait for a lost rank.
        durable_every_s: seconds between durable states; 0 for none.
        preset: name of a published failure rate.
        rate: failures per 1,000 node-days.
        process_share: share of the failures that take a process and leave its node.
        weibull_shape: shape of the gaps between failures; 1 for exponential gaps; None for that of the preset.
        burst_share: share of the node failures that take several neighbours at once.
        burst_nodes: nodes that such a burst takes.
        trace_nodes: nodes of the recorded cluster; None for those named in the trace.
        trace_days: recorded days; None for the time from the first to the last failure.
        repair_median_h: median duration of a repair, in hours.
        repair_mean_h: mean duration of a repair, in hours.
        in_place_s: recovery in place of a process, in seconds.
        standby_s: the same with a standby.
        relaunch_s: recovery by relaunching all workers.
        join_s: recovery in which a spare node replaces a lost one.
        shrink_s: recovery in which the job continues on fewer nodes.
        grow_s: pause when a repaired node rejoins.
        durable_restore_s: reading a durable state, in addition to a relaunch.
        durable_stall_s: delay of training per durable state.
        days: duration of the job.
        trials: number of simulated jobs.
        seed: seed of the random numbers.
    """

    nodes: int
    step_s: float
    ranks_per_node: int = 8
    min_nodes: int | None = None
    rack_nodes: int = 4
    spares: int | str = AUTO
    price: float | None = None
    state_bytes: float | None = None
    data_wait_s: float = 0.0
    version_s: float | None = None
    mirror_every_n_steps: int | str = AUTO
    mirror_budget: float = 0.01
    copies: int = 1
    failure_domain: str = "node"
    in_place: bool = True
    standbys: int = 0
    durable_every_s: float = 3600.0
    preset: str | None = None
    rate: float | None = None
    process_share: float = 0.0
    weibull_shape: float | None = None
    burst_share: float = BURST_SHARE
    burst_nodes: int = 2
    trace_nodes: int | None = None
    trace_days: float | None = None
    repair_median_h: float = REPAIR_MEDIAN_H
    repair_mean_h: float = REPAIR_MEAN_H
    in_place_s: float = 0.3
    standby_s: float = 0.25
    relaunch_s: float = 8.5
    join_s: float = 14.0
    shrink_s: float = 9.0
    grow_s: float = 0.3
    durable_restore_s: float = 104.0
    durable_stall_s: float = 1.0
    days: float = 30.0
    trials: int = 100
    seed: int = 0


REASONS: Mapping[str, str] = {
    "ranks_per_node": "a node has eight accelerators",
    "min_nodes": "the job is not elastic",
    "rack_nodes": "a rack, or whatever else fails as a whole, has four nodes",
    "spares": "spares suffice for 99 % of the time",
    "data_wait_s": "a step does not wait for its data",
    "version_s": "a version costs 1 % of a step",
    "durable_every_s": "a durable state is written once an hour",
    "process_share": "every failure takes a node",
    "burst_share": "3.4 % of node failures take neighbours (InfiniteHBD-Trace, hardware faults within 30 s)",
    "burst_nodes": "such a burst takes two neighbours",
    "repair_median_h": "repairs take as long as in InfiniteHBD-Trace (median)",
    "repair_mean_h": "repairs take as long as in InfiniteHBD-Trace (mean)",
    "in_place_s": "recovery in place, measured with 4 ranks on 2 CPU cores (benchmarks)",
    "standby_s": "recovery in place with a standby, measured with 4 ranks on 2 CPU cores (benchmarks)",
    "relaunch_s": "relaunch with new interpreters, measured with 4 ranks on 2 CPU cores (benchmarks)",
    "join_s": "detection of a lost node (9.1 s), start of another (4.9 s), measured with 4 nodes (benchmarks)",
    "shrink_s": "transition to fewer nodes, measured with 4 nodes (benchmarks)",
    "grow_s": "pause when a node rejoins, measured with 4 nodes (benchmarks)",
    "durable_restore_s": "reading the state from storage takes 1.73 min (TrainMover, at 8,192 GPUs)",
    "durable_stall_s": "a durable state delays training by one second",
}
"""Why a value is assumed if it is not given."""

_ABOVE_0 = ("nodes", "step_s", "ranks_per_node", "rack_nodes", "days", "trials", "mirror_budget")
_OPTIONAL_ABOVE_0 = ("weibull_shape", "min_nodes", "trace_nodes", "trace_days", "state_bytes")
_AT_LEAST_0 = (
    "data_wait_s", "version_s", "copies", "standbys", "durable_every_s", "repair_median_h", "repair_mean_h", "price",
    "in_place_s", "standby_s", "relaunch_s", "join_s", "shrink_s", "grow_s", "durable_restore_s", "durable_stall_s",
    "seed",
)  # fmt: skip
OF_A_RATE = ("process_share", "weibull_shape", "burst_share", "burst_nodes")
"""Inputs that a trace replaces."""
_OF_A_TRACE = ("trace_nodes", "trace_days")
_SHARES = ("process_share", "burst_share")
_INTEGERS = (
    "nodes", "ranks_per_node", "min_nodes", "rack_nodes", "copies", "standbys", "burst_nodes", "trace_nodes", "trials",
    "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forecastable:
    """Checked inputs, ready to be simulated.

    Args:
        inputs: the inputs.
        job: the job with the chosen options.
        failures: failures of its nodes.
        failures_text: what the failures are, with their source.
    """

    inputs: Inputs
    job: Job
    failures: Failures
    failures_text: str


def inputs_from(given: Mapping[str, Any]) -> Inputs:
    """Check inputs by name.

    Raises:
        OptionsError: a name is unknown, a value is out of range, or one is missing.
    """
    names = [field.name for field in fields(Inputs)]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise OptionsError(f"unknown input {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    for name, example in (("nodes", "--nodes 128"), ("step_s", "--step-s 10")):
        if given.get(name) is None:
            raise OptionsError(f"{name} is missing: use {example}, or --from RUN to take it from a run")
    inputs = Inputs(**given)
    _check_numbers(inputs)
    _check_cluster(inputs)
    if not isinstance(inputs.in_place, bool):
        raise OptionsError(f"in_place={inputs.in_place!r}: expected true or false")
    if inputs.failure_domain not in FAILURE_DOMAINS:
        raise OptionsError(f"failure_domain={inputs.failure_domain!r}: expected one of {', '.join(FAILURE_DOMAINS)}")
    return inputs


def require_consistent(names: Collection[str], *, trace: bool) -> None:
    """Check that no input is given that would have no effect.

    Args:
        names: names of the inputs that were given.
        trace: whether a trace is given.

    Raises:
        OptionsError: an input is for a rate but there is a trace, or the other way round.
    """
    for name in OF_A_RATE if trace else _OF_A_TRACE:
        if name in names:
            other = "a trace, which has its own" if trace else "no trace"
            raise OptionsError(
                f"{name} has no effect with {other}: leave it out{'' if trace else ' or give --trace FILE'}"
            )


def _check_numbers(inputs: Inputs) -> None:
    for name in (*_ABOVE_0, *_OPTIONAL_ABOVE_0, *_AT_LEAST_0, *_SHARES, "rate", "burst_nodes"):
        value = getattr(inputs, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise OptionsError(f"{name}={value!r}: expected a number")
        if name in _INTEGERS and value != int(value):
            raise OptionsError(f"{name}={value!r}: expected an integer")
        if name in (*_ABOVE_0, *_OPTIONAL_ABOVE_0) and value <= 0:
            raise OptionsError(f"{name}={value!r}: expected a number greater than 0")
        if name in (*_AT_LEAST_0, *_SHARES) and value < 0:
            raise OptionsError(f"{name}={value!r}: expected a number of at least 0")
        if name in _SHARES and value > 1:
            raise OptionsError(f"{name}={value!r}: expected a share from 0 to 1")
    for name, least in (("spares", 0), ("mirror_every_n_steps", 1)):
        value = getattr(inputs, name)
        if value != AUTO and (not isinstance(value, int) or value < least):
            raise OptionsError(f"{name}={value!r}: expected an integer of at least {least}, or 'auto'")


def _check_cluster(inputs: Inputs) -> None:
    if inputs.min_nodes is not None and inputs.min_nodes > inputs.nodes:
        raise OptionsError(f"min_nodes={inputs.min_nodes}: the job has only {inputs.nodes} nodes")
    if inputs.burst_share and not 2 <= inputs.burst_nodes <= inputs.rack_nodes:
        raise OptionsError(
            f"burst_nodes={inputs.burst_nodes}: expected at least 2 nodes and at most rack_nodes={inputs.rack_nodes}, "
            "or burst_share=0 for independent failures"
        )
    if inputs.repair_mean_h < inputs.repair_median_h or (inputs.repair_mean_h and not inputs.repair_median_h):
        raise OptionsError(
            f"repair_median_h={inputs.repair_median_h:g}, repair_mean_h={inputs.repair_mean_h:g}: repairs are skewed, "
            "so the mean is at least the median; give the same value twice for a constant duration"
        )


def forecastable(inputs: Inputs, trace: Sequence[TraceLine] | None) -> Forecastable:
    """Derive the job and its failures.

    Args:
        inputs: checked inputs.
        trace: failures of a recorded trace; None without one.

    Raises:
        OptionsError: there is no failure rate or more than one, or there are too few failure domains.
    """
    failures, text = _failures(inputs, trace)
    spares, every = inputs.spares, inputs.mirror_every_n_steps
    if isinstance(spares, str):
        spares = spares_needed(failures.node_losses_per_s(inputs.nodes), failures.repair)
    cluster = Cluster(inputs.nodes, inputs.ranks_per_node, inputs.min_nodes or inputs.nodes, inputs.rack_nodes)
    choices = Choices(
        mirror_every_n_steps=1 if isinstance(every, str) else every,
        copies=inputs.copies,
        failure_domain=inputs.failure_domain,
        in_place=inputs.in_place,
        standbys=inputs.standbys,
        spares=spares,
        durable_every_s=inputs.durable_every_s or None,
    )
    if (error := domains_error(cluster, choices)) is not None:
        raise OptionsError(error)
    job = Job(cluster, choices, _costs(inputs))
    if isinstance(every, str):
        job = replace(
            job, choices=replace(choices, mirror_every_n_steps=_interval(job, failures, inputs.mirror_budget))
        )
    _check_effort(inputs, failures)
    return Forecastable(inputs, job, failures, text)


def _check_effort(inputs: Inputs, failures: Failures) -> None:
    incidents = inputs.trials * inputs.days * SECONDS_PER_DAY / failures.gaps(inputs.nodes).mean_s
    if incidents > _MOST_INCIDENTS:
        raise OptionsError(
            f"{inputs.trials} jobs of {inputs.days:g} days would have {incidents:.2g} incidents, which takes too long "
            f"to simulate: reduce days or trials to at most {_MOST_INCIDENTS:.0e} incidents, e.g. "
            f"--days {inputs.days * _MOST_INCIDENTS / incidents:.2g}"
        )


def _interval(job: Job, failures: Failures, budget: float) -> int:
    """The interval that a run with `mirror_every_n_steps="auto"` chooses."""
    rate, recovery_s = 1 / failures.gaps(job.cluster.nodes).mean_s, process_recovery_s(job)
    return plan_interval(IntervalCosts(job.costs.full_step_s, job.costs.version_s, rate, recovery_s), budget).interval


def _costs(inputs: Inputs) -> Costs:
    version_s = 0.01 * inputs.step_s if inputs.version_s is None else inputs.version_s
    names = [field.name for field in fields(Costs)]
    return Costs(**{name: getattr(inputs, name) for name in names if name != "version_s"}, version_s=version_s)


def _failures(inputs: Inputs, trace: Sequence[TraceLine] | None) -> tuple[Failures, str]:
    repair = Repair(inputs.repair_median_h * SECONDS_PER_HOUR, inputs.repair_mean_h * SECONDS_PER_HOUR)
    sources = [name for name in ("preset", "rate") if getattr(inputs, name) is not None]
    sources += ["trace"] if trace is not None else []
    if len(sources) != 1:
        found = f"{' and '.join(sources)} are both given" if sources else "no failure rate is given"
        raise OptionsError(f"{found}: use one of --preset rsc-1, --rate 6.5, --trace FILE, or --from RUN")
    if trace is not None:
        model = FailureTrace.of(trace, inputs.trace_nodes, inputs.trace_days, repair)
        days = model.duration_s / SECONDS_PER_DAY
        return model, f"{len(trace)} failures of a trace of {model.nodes} nodes over {days:.4g} days"
    known = preset(inputs.preset) if inputs.preset is not None else None
    rate = known.rate if known is not None else inputs.rate
    assert rate is not None
    shape = inputs.weibull_shape or (known.shape if known is not None else 1.0)
    text = f"{rate:g} failures per 1,000 node-days" + (f" ({known.source}; {known.basis})" if known else "")
    gaps = "exponential gaps" if shape == 1 else f"Weibull gaps of shape {shape:g}"
    share, burst = inputs.process_share, inputs.burst_share if inputs.nodes > 1 else 0.0
    return FailureModel(require_rate(rate), repair, shape, share, burst, inputs.burst_nodes), f"{text}, {gaps}"
