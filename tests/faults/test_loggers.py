"""Real tracking stores after the loss of rank 0 or of all ranks: one run, its parameters, each row once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import Variant, run_variant
from tests.faults.conftest import REPOSITORY
from tests.lab.tracked import Read, read_mlflow_database, read_store

SCRIPT = REPOSITORY / "tests" / "lab" / "tracked.py"
STORES = ("journal", "wandb", "mlflow")
NEEDED = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
Run = Callable[..., Variant]
_START_S = 120.0
_POLL_EVERY_S = 0.1


@dataclass(frozen=True)
class Server:
    """An MLflow tracking server.

    Args:
        uri: its address.
        database: its SQLite file.
    """

    uri: str
    database: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a free port with its own database. The extra `loggers` installs the client only."""
    pytest.importorskip("flask", reason="the server needs all of MLflow: pip install mlflow")
    pytest.importorskip("flask_cors", reason="the server needs all of MLflow: pip install mlflow")
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--default-artifact-root", str(folder)]
    # Job execution would start nine more processes.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", *stores, *place]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            uri = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + _START_S
            while not _answers(uri):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                threading.Event().wait(_POLL_EVERY_S)
            yield Server(uri, folder / "runs.db")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(uri: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@pytest.fixture(scope="module")
def run(parent: ForkServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """Return a function that runs the script with a store; each run without faults runs once."""
    undisturbed: dict[str, Variant] = {}

    def start(
        store: str, faults: str = "", raise_at: int = 0, env: Mapping[str, str] = MappingProxyType({})
    ) -> Variant:
        if not (faults or raise_at) and store in undisturbed:
            return undisturbed[store]
        for name in NEEDED.get(store, ()):
            pytest.importorskip(name, reason="installed by the extra `loggers`")
        variant = run_variant(
            [str(SCRIPT), store, str(raise_at)],
            tmp_path_factory.mktemp(store) / "run",
            faults=faults,
            parent=parent,
            isolate=True,
            env={"PYTHONPATH": str(REPOSITORY), "WANDB_SILENT": "true", **env},
            timeout_s=200,
        )
        if not (faults or raise_at):
            undisturbed[store] = variant
        return variant

    return start


def only_run(runs: dict[str, Read]) -> Read:
    (read,) = runs.values()
    return read


def output(variant: Variant) -> str:
    return "\n".join(path.read_text() for path in (variant.folder / "output").rglob("*.log"))


def checkpoint(variant: Variant) -> str:
    (path,) = re.findall(r"best model at .*?(checkpoints/.*)", output(variant))
    return str(path)


FAULTS = {
    "rank 0 in place": "kill:rank=0:step=4",
    "rank 0 while the rows of a step are committed": "kill:rank=0:step=4:at=mirror",
    "all ranks": "kill:rank=all:step=4",
    "rank 0 after a validation, then rank 1, then all": "kill:rank=0:step=7,kill:rank=1:step=9,kill:rank=all:step=11",
}
SHORT = {("journal", "rank 0 in place"), ("journal", "all ranks")}


@pytest.mark.parametrize(
    ("store", "faults"),
    [
        pytest.param(store, name, marks=[] if (store, name) in SHORT else pytest.mark.long)
        for store in STORES
        for name in FAULTS
    ],
)
def test_one_run_with_every_row_once(store: str, faults: str, run: Run) -> None:
    assert_same_run(run(store), run(store, FAULTS[faults]), lambda folder: read_store(store, folder))


@pytest.mark.long
@pytest.mark.parametrize("faults", ["rank 0 in place", "all ranks"])
def test_one_run_on_an_mlflow_server(faults: str, server: Server, run: Run) -> None:
    env = {"MLFLOW_TRACKING_URI": server.uri}
    undisturbed, variant = run("mlflow-server", env=env), run("mlflow-server", FAULTS[faults], env=env)
    assert_same_run(undisturbed, variant, lambda folder: read_mlflow_database(server.database, folder))


def assert_same_run(undisturbed: Variant, variant: Variant, read: Callable[[Path], dict[str, Read]]) -> None:
    """Assert that both runs of the script have one run in their store, with the same content."""
    assert (undisturbed.exit_code, variant.exit_code) == (0, 0), variant.tail()
    expected, found = only_run(read(undisturbed.folder / "cwd")), only_run(read(variant.folder / "cwd"))
    assert {step for step, _ in expected.rows} == set(range(12))
    assert found.rows == expected.rows
    assert found.params == expected.params
    assert found.params["lr"] == "0.1"
    assert found.status == expected.status
    assert any(event.event == "restored" for event in variant.events)
    assert checkpoint(variant) == checkpoint(undisturbed)
    assert "dirpath has changed" not in output(variant)
    assert "cannot be identified" not in output(variant)


def test_rows_up_to_an_error_are_logged(run: Run) -> None:
    """Rows that are buffered when the script raises are logged, as they would be under DDP."""
    undisturbed, variant = run("journal"), run("journal", raise_at=5)
    assert variant.exit_code == 1
    expected, found = (only_run(read_store("journal", each.folder / "cwd")) for each in (undisturbed, variant))
    assert found.status == "failed"
    assert found.rows == [row for row in expected.rows if row[0] < 4 or (row[0] == 4 and "lr-SGD" in dict(row[1]))]
