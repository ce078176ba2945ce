"""Metrics follow the conventions of Prometheus, and the dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lightning_ckptless.cli.survey.survey import survey_of
from lightning_ckptless.cli.view.metrics import METRICS, metrics_text
from tests.cli.ledgers import recovery
from tests.cli.survey.readings import event, placed, reading, time_spent, worker
from tests.house.code import REPOSITORY

SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')
DASHBOARD = REPOSITORY / "examples" / "clusters" / "grafana.json"


def parsed(text: str) -> dict[tuple[str, str], float]:
    """The samples of a text: values by name and labels. Fails on a line that Prometheus would not read."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def everything() -> str:
    """The metrics of a run of which everything is known."""
    events = [
        placed(),
        event("standbys", 50.0, ready=1, wanted=2),
        event("durable_written", 30.0, step=4, path="/durable/step-4"),
        event("committed", 20.0, 0, step=3, of=100),
        event("recovery", 10.0, 0, **recovery(2)),
        event("committed", 5.0, 0, step=6, of=100),
        time_spent(2.0, training=90.0, regroup=0.3),
    ]
    return metrics_text(survey_of(reading(events, workers=[worker(0), worker(1, own_s=0.2)])))


def test_values() -> None:
    found = parsed(everything())
    assert found["ckptless_run_state", 'state="running"'] == 1
    assert found["ckptless_run_state", 'state="ended"'] == 0
    assert found["ckptless_losses_survived", 'domain="node"'] == 1
    assert found["ckptless_rank_step_seconds", 'rank="1",node="b"'] == 0.2
    assert found["ckptless_alarms", 'kind="straggler"'] == 1
    assert found["ckptless_tier_lag_steps", 'tier="storage"'] == 3
    assert found["ckptless_time_seconds_total", 'bucket="regroup"'] == pytest.approx(0.3)
    assert found["ckptless_standbys_ready", ""] == 1


def test_every_metric_is_exported_with_its_kind() -> None:
    ended = metrics_text(survey_of(reading([event("run_ended", 1.0, 0)])))
    text = everything()
    names = {name for name, _ in parsed(text)} | {name for name, _ in parsed(ended)}
    assert names == {metric.name for metric in METRICS}
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text + ended


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"ckptless_[a-z_]+", metric.name)
        assert metric.kind in {"gauge", "counter"}
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not re.search(r"_(ms|s|min|mb|gb|percent)\b", metric.name)
        assert metric.about.endswith(".")


def test_labels_are_escaped() -> None:
    run = reading([placed()])
    strange = survey_of(type(run)(**{**{n: getattr(run, n) for n in run.__slots__}, "run_id": 'a"b\\c\nd'}))
    assert r'ckptless_run_info{run_id="a\"b\\c\nd"} 1.0' in metrics_text(strange).splitlines()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bckptless_\w+", query)}
    assert asked <= {metric.name for metric in METRICS}
    assert len(asked) > 10


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
