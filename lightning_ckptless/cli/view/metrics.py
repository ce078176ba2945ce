"""A run as metrics, in the text format of Prometheus.

Names follow its conventions: base units (seconds, bytes, ratios), and `_total` for what only grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lightning_ckptless.cli.survey.alarms import AlarmKind
from lightning_ckptless.cli.survey.members import Member
from lightning_ckptless.cli.survey.survey import STATES, Survey

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, object]
Samples = Iterable[tuple[Labels, float | None]]
_NO_LABELS: Labels = {}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Args:
        name: its name.
        kind: `gauge` or `counter`.
        about: its meaning.
        samples: returns its labels and values in a run; those without a value are left out.
    """

    name: str
    kind: str
    about: str
    samples: Callable[[Survey], Samples]


def _one(value: Callable[[Survey], float | None]) -> Callable[[Survey], Samples]:
    return lambda run: [(_NO_LABELS, value(run))]


def _by_rank(value: Callable[[Member], float | None]) -> Callable[[Survey], Samples]:
    return lambda run: [({"rank": member.rank, "node": member.node}, value(member)) for member in run.members]


def _alarms(run: Survey) -> Samples:
    counts = Counter(str(alarm.kind) for alarm in run.alarms)
    return [({"kind": kind}, counts[kind]) for kind in AlarmKind]


def _last_recovery_s(run: Survey) -> float | None:
    return run.recoveries[-1]["total_s"] if run.recoveries else None


METRICS = (
    Metric("ckptless_run_info", "gauge", "The run that is watched.", lambda run: [({"run_id": run.run_id}, 1)]),
    Metric(
        "ckptless_run_state",
        "gauge",
        "1 for the state of the run, 0 for all others.",
        lambda run: [({"state": state}, state == run.state) for state in STATES],
    ),
    Metric("ckptless_generation", "gauge", "Number of the generation.", _one(lambda run: run.generation)),
    Metric("ckptless_world_size", "gauge", "Number of ranks.", _one(lambda run: run.world_size)),
    Metric("ckptless_step", "gauge", "Newest committed optimizer step.", _one(lambda run: run.pace.step)),
    Metric("ckptless_steps_planned", "gauge", "Number of optimizer steps in all.", _one(lambda run: run.pace.of)),
    Metric(
        "ckptless_steps_per_second",
        "gauge",
        "Committed optimizer steps per second over the last minutes.",
        _one(lambda run: run.pace.steps_per_s),
    ),
    Metric("ckptless_eta_seconds", "gauge", "Time until the last step.", _one(lambda run: run.pace.eta_s)),
    Metric(
        "ckptless_losses_survived",
        "gauge",
        "Number of failure domains of which any may be lost at once.",
        lambda run: [({"domain": run.protected.domain}, run.protected.losses)],
    ),
    Metric(
        "ckptless_protected_version_age_seconds",
        "gauge",
        "Age of the version that survives these losses.",
        _one(lambda run: run.protected.age_s),
    ),
    Metric(
        "ckptless_tier_step",
        "gauge",
        "Optimizer step of the newest version in a tier.",
        lambda run: [({"tier": tier.name}, tier.step) for tier in run.tiers],
    ),
    Metric(
        "ckptless_tier_lag_steps",
        "gauge",
        "Optimizer steps from this version to the newest finished step.",
        lambda run: [({"tier": tier.name}, tier.lag_steps) for tier in run.tiers],
    ),
    Metric(
        "ckptless_tier_age_seconds",
        "gauge",
        "Age of the newest version in a tier.",
        lambda run: [({"tier": tier.name}, tier.age_s) for tier in run.tiers],
    ),
    Metric("ckptless_rank_step", "gauge", "Optimizer step that a rank has begun.", _by_rank(lambda rank: rank.step)),
    Metric(
        "ckptless_rank_progress_age_seconds",
        "gauge",
        "Time since the last sign of progress of a rank.",
        _by_rank(lambda rank: rank.progress_age_s),
    ),
    Metric(
        "ckptless_rank_step_seconds",
        "gauge",
        "A rank's own time per step, without waiting for other ranks.",
        _by_rank(lambda rank: rank.step_s),
    ),
    Metric(
        "ckptless_rank_running",
        "gauge",
        "Whether the process of a rank on this host runs.",
        _by_rank(lambda rank: None if rank.state == "elsewhere" else rank.state == "running"),
    ),
    Metric(
        "ckptless_standbys_ready",
        "gauge",
        "Standbys that are ready.",
        _one(lambda run: run.standbys.ready if run.standbys else None),
    ),
    Metric(
        "ckptless_standbys_wanted",
        "gauge",
        "Standbys that are wanted.",
        _one(lambda run: run.standbys.wanted if run.standbys else None),
    ),
    Metric(
        "ckptless_arena_bytes",
        "gauge",
        "Memory in use by an arena on this host.",
        lambda run: [({"node": arena.node, "arena": arena.path}, arena.bytes) for arena in run.arenas],
    ),
    Metric("ckptless_alarms", "gauge", "Alarms that are raised now.", _alarms),
    Metric("ckptless_recoveries_total", "counter", "Recoveries so far.", _one(lambda run: run.recovery_count)),
    Metric("ckptless_last_recovery_seconds", "gauge", "Duration of the last recovery.", _one(_last_recovery_s)),
    Metric(
        "ckptless_time_seconds_total",
        "counter",
        "Time by what it was spent on.",
        lambda run: [({"bucket": name}, seconds) for name, seconds in run.time_s.items()],
    ),
    Metric("ckptless_goodput_ratio", "gauge", "Goodput of the run, 0 to 1.", _one(lambda run: run.goodput)),
    Metric("ckptless_read_timestamp_seconds", "gauge", "When the run was read.", _one(lambda run: run.at)),
)
"""All metrics, in the order in which they are shown."""


def metrics_text(run: Survey) -> str:
    """Return the metrics of a run in the text format of Prometheus.

    Args:
        run: status of the run.
    """
    lines: list[str] = []
    for metric in METRICS:
        samples = [(labels, float(value)) for labels, value in metric.samples(run) if value is not None]
        if samples:
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{metric.name}{_labels(labels)} {value!r}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    shown = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())
    return f"{{{shown}}}" if shown else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
