"""Every option of the strategy has an observable effect, and recoveries appear in logs and metrics."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.runner import remove_arenas
from tests.faults.matrix import BASE, is_version
from tests.faults.test_restart import Run, job
from tests.lab.parts import Options

__all__ = ["job"]
SHORT = replace(BASE, epochs=1)


def _with(**strategy_options: object) -> Options:
    return replace(SHORT, strategy_options=repr(strategy_options))


def _columns(folder: Path) -> dict[str, list[float]]:
    (path,) = folder.glob("lightning_logs/version_0/metrics.csv")
    columns: dict[str, list[float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def test_costs_of_recovery_and_mirroring_are_logged(job: Run) -> None:
    assert job.start(replace(BASE, checkpoint_every=3), "kill:rank=1:step=5", max_restarts=3).exit_code == 0
    columns = _columns(job.folder)
    spent = {name: seconds for name, (*_, seconds) in columns.items() if name.startswith("ckptless/time_")}
    empty = {Bucket.ABORT, Bucket.REPLAY, Bucket.REWIND, Bucket.ELASTIC_TRANSITION, Bucket.IDLE}
    for bucket in set(Bucket) - empty:
        assert spent[f"ckptless/time_{bucket}_s"] > 0, bucket
    assert columns["ckptless/goodput"][-1] == pytest.approx(spent["ckptless/time_training_s"] / sum(spent.values()))
    assert columns["ckptless/goodput_1h"][-1] == pytest.approx(columns["ckptless/goodput"][-1])
    assert {event.rank for event in job.events("rank_time")} == {0, 1}
    assert all(event.fields["data_wait_s"] > 0 and event.fields["own_s"] > 0 for event in job.events("rank_time"))
    last = [columns[f"ckptless/{name}"][-1] for name in ("mtbf_low_s", "mtbf_s", "mtbf_high_s")]
    assert last == sorted(last)
    assert columns["ckptless/recoveries"][-1] == 1
    assert columns["ckptless/steps_replayed"][-1] in (1, 2)
    assert 0 < columns["ckptless/goodput"][-1] < 1
    assert columns["ckptless/recovery_s"][-1] > 0
    phases = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s")
    parts = sum(columns[f"ckptless/recovery_{phase}"][-1] for phase in phases)
    assert parts == pytest.approx(columns["ckptless/recovery_s"][-1], abs=1e-6)
    assert columns["ckptless/mirrored_bytes"][-1] > 0
    assert columns["ckptless/mirror_ms"][-1] > 0
    assert columns["ckptless/mirror_stall_ms"][-1] >= 0
    assert re.search(r"recovered in place \(rank 1 died by SIGKILL\): resumed from step [34]", job.output)


def test_too_many_recoveries_without_progress_end_the_run(job: Run, capfd: pytest.CaptureFixture[str]) -> None:
    options = _with(max_recoveries_without_progress=2)
    outcome = job.start(options, "kill:rank=1:step=3:at=backward:times=9", max_restarts=9)
    # The version before the fault may be committed during the replay, which counts as progress once.
    assert outcome.in_place + outcome.restarts in (2, 3)
    assert outcome.exit_code == 128 + 9
    assert outcome.has_given_up
    assert "max_recoveries_without_progress=2 allows no more" in capfd.readouterr().err


def test_too_many_recoveries_per_hour_end_the_run(job: Run, capfd: pytest.CaptureFixture[str]) -> None:
    faults = "kill:rank=1:step=2,kill:rank=0:step=4,kill:rank=1:step=6"
    outcome = job.start(_with(max_recoveries_per_hour=2), faults, max_restarts=9)
    assert (outcome.exit_code, outcome.in_place + outcome.restarts) == (128 + 9, 2)
    assert "max_recoveries_per_hour=2 allows no more" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["xxh3", "crc32"])
def test_checksum_selects_the_algorithm(kind: str, job: Run) -> None:
    job.start(_with(checksum=kind), "kill:rank=1:step=5")
    assert {replica.checksum.partition(":")[0] for replica in job.arena.inventory()} == {kind}


@pytest.mark.parametrize(("domain", "holders"), [("node", 1), ("rank", 2)])
def test_failure_domain_determines_the_holders(domain: str, holders: int, job: Run) -> None:
    job.start(_with(failure_domain=domain), "kill:rank=1:step=5")
    replicas = job.arena.inventory()
    assert {len({r.holder for r in replicas if r.shard == shard}) for shard in (0, 1)} == {holders}


def test_zero_copies_leave_each_shard_with_its_own_rank(job: Run) -> None:
    job.start(_with(failure_domain="rank", copies=0), "kill:rank=1:step=5")
    assert all(replica.holder == replica.shard for replica in job.arena.inventory())


def test_a_failure_domain_without_a_name_is_refused(job: Run) -> None:
    outcome = job.start(_with(failure_domain="rack"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "failure_domain='rack': the rack of host " in job.output


def test_more_copies_than_failure_domains_are_refused(job: Run) -> None:
    outcome = job.start(_with(failure_domain="rank", copies=2), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "OptionsError" in job.output


@pytest.mark.parametrize(("on_late", "skips"), [("skip", True), ("wait", False)])
def test_a_late_mirror_is_awaited_or_skipped(on_late: str, skips: bool, job: Run) -> None:
    options = replace(_with(on_late=on_late), slow_mirror_s=0.2)
    assert job.start(options).exit_code == 0
    assert (_columns(job.folder)["ckptless/mirror_skipped"][-1] > 0) is skips


@pytest.mark.parametrize(("staging", "warns"), [("overlap", True), ("blocking", False), ("device", False)])
def test_staging_decides_whether_weights_may_change_before_the_step(staging: str, warns: bool, job: Run) -> None:
    assert job.start(replace(_with(staging=staging), callback="decaying")).exit_code == 0
    assert ("From now on the state is copied before the next batch starts" in job.output) is warns


def test_a_node_that_fails_its_health_check_is_excluded(job: Run) -> None:
    outcome = job.start(_with(health_check="parts.link_is_down"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "failed its health check: parts.link_is_down raised OSError: the link is down" in job.output


def test_all_workers_are_relaunched_if_in_place_is_off(job: Run) -> None:
    outcome = job.start(_with(in_place=False), "kill:rank=1:step=3", max_restarts=3)
    assert (outcome.exit_code, outcome.in_place, outcome.restarts) == (0, 0, 1)


def test_a_standby_replaces_a_lost_rank(job: Run) -> None:
    options = replace(_with(standbys=1), samples=800)
    assert job.start(options, "kill:rank=1:step=90", max_restarts=3).exit_code == 0
    assert job.events("standbys")[-1].fields["wanted"] == 1
    assert [origin for _, origin in job.events("in_place")[0].fields["new"].values()] == ["standby"]


def test_arena_dir_sets_the_folder_of_the_arena(job: Run, tmp_path: Path) -> None:
    folder = tmp_path / "arenas"
    folder.mkdir()
    job.start(_with(arena_dir=str(folder)), "kill:rank=1:step=3")
    assert [path.name.startswith(f"ckptless-{job.run_id}") for path in folder.iterdir()] == [True]
    assert job.config is not None
    remove_arenas(job.config)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("per_day", "interval"), [(1e-3, "1000"), (1e9, r"\d+")])
def test_the_mirror_interval_is_chosen_by_cost(per_day: float, interval: str, job: Run) -> None:
    options = {"mirror_every_n_steps": "auto", "failures_per_day": per_day, "mirror_budget": 1.0}
    assert job.start(replace(SHORT, samples=480, strategy_options=repr(options))).exit_code == 0
    (chosen,) = re.findall(r"a version is mirrored every (\d+) steps? from now on; rank 0 proposed", job.output)
    assert re.fullmatch(interval, chosen)
    assert (chosen == "1000") == (per_day < 1)


def test_a_single_rank_is_restored_from_its_own_arena(job: Run) -> None:
    options = replace(BASE, devices=1)
    assert job.start(options, "kill:rank=0:step=5", max_restarts=3).exit_code == 0
    assert is_version(job.events("recovery")[0].fields["version"], "step 4")


def test_an_unknown_option_is_reported(tmp_path: Path, job: Run) -> None:
    outcome = job.start(_with(mirror_every=3), max_restarts=3)
    assert outcome.exit_code == 1
    assert "mirror_every" in job.output
