"""A logger continues the same run of its tracking store in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.internals.lightning.logger_identity import (
    forget_identity,
    identity_of,
    set_identity,
    variables_of,
)
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.transport import SoloTransport
from lightning_ckptless.trainer.outputs.loggers import RunLoggers
from lightning_ckptless.trainer.session.member_set import MemberSet
from tests.outsider import call_as_another_user, needs_another_user, open_to_all
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer


def file_logger(kind: str, root: Path, distribution: str = DISTRIBUTIONS[0], **given: Any) -> Any:
    return getattr(module(distribution, "loggers"), kind)(str(root), **given)


def own_logger(distribution: str = DISTRIBUTIONS[0], **methods: Any) -> Any:
    """Make a user-defined logger."""
    base = module(distribution, "loggers").Logger
    silent = dict.fromkeys(("log_metrics", "log_hyperparams"), lambda *_, **__: None)
    return type("Own", (base,), {"name": "own", "version": 0, **silent, **methods})()


def run_loggers(logger: Any, folder: Path, fit_index: int = 0) -> RunLoggers:
    return RunLoggers(tiny_trainer(folder, logger=logger), folder / "run", fit_index)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with closing(Arena.create(tmp_path, "run", "n1", Owner.of(os.getpid()))) as made:
        yield made


def members_of(arena: Arena, *notes: ArenaNotes) -> MemberSet:
    nodes = tuple(f"n{number}" for number in range(len(notes)))
    return MemberSet(SoloTransport(), arena, nodes, place(nodes, 1 if len(nodes) > 1 else 0), 1, notes)


# ---------------------------------------------------------------------- by class


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_a_new_logger_writes_into_the_folder_of_the_run(kind: str, distribution: str, tmp_path: Path) -> None:
    logger = file_logger(kind, tmp_path / "first", distribution, name="at-10-15")
    (tmp_path / "first" / "at-10-15" / "version_0").mkdir(parents=True)
    assert logger.version == 1
    fresh = file_logger(kind, tmp_path / "second", distribution, name="at-10-16")
    set_identity(fresh, identity_of(logger))
    assert (fresh.name, fresh.save_dir, fresh.version) == ("at-10-15", str(tmp_path / "first"), 1)
    assert fresh.log_dir == logger.log_dir
    forget_identity(fresh)
    logger.log_hyperparams({})
    assert fresh.version == 2
    logger.finalize("success")


def test_an_unset_version_stays_unset(tmp_path: Path) -> None:
    fresh = file_logger("CSVLogger", tmp_path)
    set_identity(fresh, identity_of(file_logger("CSVLogger", tmp_path)))
    assert fresh.version == 0


def test_identities_apply_only_to_the_same_kind_of_logger(tmp_path: Path) -> None:
    logger = file_logger("CSVLogger", tmp_path)
    loggers = run_loggers(logger, tmp_path)
    loggers.identify([{"kind": "TensorBoardLogger", "identity": {"_version": 4}}])
    assert logger.version == 0


def test_resuming_from_a_checkpoint_file_uses_a_new_folder_with_the_scripts_name(tmp_path: Path) -> None:
    logger = file_logger("CSVLogger", tmp_path, name="script")
    loggers = run_loggers(logger, tmp_path)
    loggers.identify([{"kind": "CSVLogger", "identity": {"_name": "run", "_version": 4}}])
    assert (logger.name, logger.version) == ("run", 4)
    loggers.start_new_runs()
    assert (logger.name, logger.version) == ("script", 0)


# ---------------------------------------------------------------------- by the protocol


def test_a_user_defined_logger_keeps_its_run_through_two_methods(tmp_path: Path) -> None:
    def identify(self: Any) -> dict[str, Any]:
        return {"run": self.run}

    def continue_(self: Any, identity: dict[str, Any]) -> None:
        self.run = identity["run"]

    methods: dict[str, Any] = {"run": None, "ckptless_identity": identify, "set_ckptless_identity": continue_}
    logger, fresh = own_logger(**methods), own_logger(**methods)
    logger.run, fresh.run = "a", "b"
    saved = run_loggers(logger, tmp_path).identities
    assert saved == [{"kind": "Own", "identity": {"run": "a"}}]
    run_loggers(fresh, tmp_path).identify(saved)
    assert fresh.run == "a"


@pytest.mark.parametrize("answer", [{"run": object()}, ["a"], None])
def test_an_identity_that_is_not_plain_data_is_rejected(answer: Any) -> None:
    logger = own_logger(ckptless_identity=lambda _: answer, set_ckptless_identity=lambda *_: None)
    with pytest.raises(OptionsError, match=r"Own.ckptless_identity\(\) must return"):
        identity_of(logger)


def test_a_logger_without_an_identity_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dummy = module(DISTRIBUTIONS[0], "loggers.logger").DummyLogger()
    known = [file_logger("CSVLogger", tmp_path), dummy]
    run_loggers(known, tmp_path).warn_of_unknown_loggers()
    run_loggers([*known, own_logger(), own_logger()], tmp_path).warn_of_unknown_loggers()
    (said,) = (record.message for record in caplog.records if record.name.startswith("lightning_ckptless"))
    assert "Own" in said
    assert "ckptless_identity() and set_ckptless_identity(identity)" in said


def test_a_dummy_logger_is_ignored(tmp_path: Path, arena: Arena) -> None:
    loggers = run_loggers(module(DISTRIBUTIONS[0], "loggers.logger").DummyLogger(), tmp_path)
    loggers.hold(arena.path)
    loggers.note(members_of(arena, ArenaNotes()))
    assert arena.notes().logger_identities == []
    loggers.release()


# ---------------------------------------------------------------------- where it is kept


def test_a_joining_node_adopts_the_runs_of_rank_0(tmp_path: Path, arena: Arena) -> None:
    """A joining node may have chosen different runs itself, and it may become the node of rank 0."""
    first, second = ([{"kind": "CSVLogger", "identity": {"_version": version}}] for version in (3, 7))
    notes = ArenaNotes(logger_identities=first), ArenaNotes(logger_identities=second)
    logger = file_logger("CSVLogger", tmp_path, version=7)
    run_loggers(logger, tmp_path).identify_as_noted(members_of(arena, *notes))
    assert logger.version == 3
    assert arena.notes().logger_identities == first


@pytest.mark.parametrize("arena_is_empty", [False, True])
def test_a_new_process_finds_the_run_in_the_arena_or_in_the_runs_folder(
    arena_is_empty: bool, tmp_path: Path, arena: Arena
) -> None:
    first = file_logger("CSVLogger", tmp_path, version=5)
    run_loggers(first, tmp_path, fit_index=1).note(members_of(arena, ArenaNotes()))
    if arena_is_empty:
        (arena.path / "note-logger_identities.json").unlink()
    fresh = file_logger("CSVLogger", tmp_path)
    run_loggers(fresh, tmp_path, fit_index=1).identify_alone(arena.notes())
    assert fresh.version == 5
    other = file_logger("CSVLogger", tmp_path)
    if arena_is_empty:
        run_loggers(other, tmp_path, fit_index=2).identify_alone(arena.notes())
        assert other.version == 0


def test_variables_for_rank_0_are_kept_in_the_runs_folder(tmp_path: Path) -> None:
    assert environment.kept_for_rank_zero(tmp_path) == {}
    environment.keep_for_rank_zero(tmp_path, {"WANDB_RUN_ID": "a"})
    environment.keep_for_rank_zero(tmp_path, {"WANDB_RUN_ID": "b"})
    assert environment.kept_for_rank_zero(tmp_path) == {"WANDB_RUN_ID": "b"}


@pytest.mark.parametrize("planted", ["writable", "link", pytest.param("foreign", marks=needs_another_user)])
def test_variables_that_another_user_could_have_written_are_not_passed_to_rank_0(planted: str, tmp_path: Path) -> None:
    """Otherwise anyone who can write to the run's folder could make the next process load any library."""
    folder = open_to_all(tmp_path / "run")
    environment.keep_for_rank_zero(folder, {"LD_PRELOAD": "evil.so"})
    (kept,) = folder.iterdir()
    text = kept.read_text()
    if planted == "writable":
        kept.chmod(0o660)
    elif planted == "link":
        kept = kept.rename(tmp_path / "elsewhere.json")
        (folder / "variables-of-rank-0.json").symlink_to(kept)
    else:
        kept.unlink()
        call_as_another_user(lambda: kept.write_text(text))
    assert environment.kept_for_rank_zero(folder) == {}
    if planted != "foreign":
        environment.keep_for_rank_zero(folder, {"WANDB_RUN_ID": "a"})
        assert environment.kept_for_rank_zero(folder) == {"WANDB_RUN_ID": "a"}
        assert json.loads(text) == {"LD_PRELOAD": "evil.so"}


# ---------------------------------------------------------------------- tracking services


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_wandb_resumes_by_its_id(distribution: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="installed by the extra `loggers`")
    make = module(distribution, "loggers").WandbLogger
    logger, fresh = (make(name=name, project="p", save_dir=str(tmp_path), offline=True) for name in ("10:15", "10:16"))
    set_identity(logger, {"_id": "abc"})
    set_identity(fresh, identity_of(logger))
    assert (fresh.version, fresh._wandb_init["name"]) == ("abc", "10:15")
    assert (fresh._wandb_init["id"], fresh._wandb_init["resume"]) == ("abc", "allow")
    assert fresh.save_dir == str(tmp_path)
    assert variables_of([fresh]) == {"WANDB_RUN_ID": "abc", "WANDB_RESUME": "allow"}
    assert variables_of([fresh, logger]) == {}
    forget_identity(fresh)
    assert fresh._wandb_init["id"] is None


MLFLOW = """
import importlib, sys
from lightning_ckptless.internals.lightning.logger_identity import identity_of, set_identity
make = importlib.import_module(sys.argv[1] + ".loggers").MLFlowLogger
logger, fresh = (make("e", tracking_uri="sqlite:///runs.db") for _ in range(2))
stray = fresh.run_id
assert stray != logger.run_id
set_identity(fresh, identity_of(logger))
assert (fresh.run_id, fresh.name) == (logger.run_id, logger.name)
assert fresh.experiment.get_run(stray).info.status == "KILLED"
fresh.finalize("success")
assert fresh.experiment.get_run(logger.run_id).info.status == "FINISHED"
"""


@pytest.mark.long
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mlflow_continues_its_run_and_ends_a_run_opened_before_fit(distribution: str, tmp_path: Path) -> None:
    for name in ("mlflow", "sqlalchemy"):
        pytest.importorskip(name, reason="installed by the extra `loggers`")
    # In a separate process: MLflow keeps the database open.
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", MLFLOW, distribution], cwd=tmp_path, env=env, check=True, timeout=120)


COMET = """
import os
from pathlib import Path
from types import SimpleNamespace

from {distribution}.loggers import CometLogger
from lightning_ckptless.trainer.outputs.loggers import RunLoggers

logger = CometLogger(project="project")
RunLoggers(SimpleNamespace(loggers=[logger]), Path(), 0).warn_of_unknown_loggers()
os._exit(0)
"""


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_offline_comet_warns_that_a_killed_process_loses_its_rows(distribution: str, tmp_path: Path) -> None:
    """Uses a separate process, since Comet's threads do not end."""
    pytest.importorskip("comet_ml", reason="installed by the extra `loggers`")
    env = {**os.environ, "COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", COMET.format(distribution=distribution)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("CometLogger: in offline mode, rows are in a temporary folder until the process ends") == 1
