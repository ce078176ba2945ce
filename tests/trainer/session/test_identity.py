"""A worker's run, node and agent, read from its environment."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.trainer.session.identity import identify, is_worker, may_be_restarted
from tests.trainer.tiny import tiny_trainer

OURS = {
    "TORCHELASTIC_RUN_ID": "digits",
    environment.AGENT: "123",
    environment.NODE: "node-1",
    environment.RUN_ROOT: "/runs",
}


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return tiny_trainer(tmp_path)


def test_a_process_started_by_an_agent_is_a_worker() -> None:
    assert is_worker({"TORCHELASTIC_RUN_ID": "none"})
    assert not is_worker({environment.AGENT: "123"})


@pytest.mark.parametrize(("restarts", "most", "answer"), [(0, 0, False), (0, 1, True), (2, 3, True), (3, 3, False)])
def test_a_worker_may_be_restarted_up_to_the_launchers_limit(restarts: int, most: int, answer: bool) -> None:
    env = {"TORCHELASTIC_RESTART_COUNT": str(restarts), "TORCHELASTIC_MAX_RESTARTS": str(most)}
    assert may_be_restarted(env) is answer


def test_the_identity_of_a_worker_of_our_agent(trainer: Any) -> None:
    identity = identify(trainer, OURS)
    assert (identity.run_id, identity.node, identity.agent_pid) == ("digits", "node-1", 123)
    assert identity.own_agent
    assert identity.run_folder == Path("/runs/digits")


def test_the_identity_of_a_worker_of_torchrun(trainer: Any, tmp_path: Path) -> None:
    identity = identify(trainer, {"TORCHELASTIC_RUN_ID": "digits"})
    assert (identity.run_id, identity.agent_pid) == ("digits", os.getppid())
    assert not identity.own_agent
    assert identity.node.endswith(f"-{os.getppid()}")
    assert identity.run_folder == tmp_path / "ckptless" / "digits"


@pytest.mark.parametrize("run_id", ["none", ""])
def test_a_run_without_a_name_is_named_after_its_agent(run_id: str, trainer: Any) -> None:
    identity = identify(trainer, {"TORCHELASTIC_RUN_ID": run_id})
    assert identity.run_id.startswith("torchrun-")
    assert identity.run_id.endswith(f"-{os.getppid()}")


@pytest.mark.parametrize("run_id", ["a/b", "../up", "two words", "what?*"])
def test_the_name_of_a_run_is_a_single_folder_name(run_id: str, trainer: Any, tmp_path: Path) -> None:
    identity = identify(trainer, OURS | {"TORCHELASTIC_RUN_ID": run_id, environment.RUN_ROOT: str(tmp_path)})
    assert identity.run_folder.parent == tmp_path
    assert identity.run_folder.resolve().parent == tmp_path.resolve()


def test_unusual_characters_of_a_host_name_are_replaced(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my host/0")
    assert identify(trainer, {"TORCHELASTIC_RUN_ID": "digits"}).node == f"my-host-0-{os.getppid()}"


def test_the_run_root_does_not_depend_on_the_working_directory(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert identify(trainer, OURS | {environment.RUN_ROOT: "runs"}).run_folder == tmp_path / "runs" / "digits"
