"""Tracking stores, real ones, of runs that lose rank 0 or all ranks: one run, its parameters, each row once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import Variant, run_variant
from tests.faults.conftest import REPOSITORY
from tests.lab.tracked import Read, read_store

SCRIPT = REPOSITORY / "tests" / "lab" / "tracked.py"
STORES = {"journal": (), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
Run = Callable[..., Variant]


@pytest.fixture(scope="module")
def run(parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the script with a store; a run without faults is made once."""
    whole: dict[str, Variant] = {}

    def start(store: str, faults: str = "", raise_at: int = 0) -> Variant:
        if not (faults or raise_at) and store in whole:
            return whole[store]
        for name in STORES[store]:
            pytest.importorskip(name, reason="installed by the extra `loggers`")
        variant = run_variant(
            [str(SCRIPT), store, str(raise_at)],
            tmp_path_factory.mktemp(store) / "run",
            faults=faults,
            parent=parent,
            isolate=True,
            env={"PYTHONPATH": str(REPOSITORY), "WANDB_SILENT": "true"},
            timeout_s=200,
        )
        if not (faults or raise_at):
            whole[store] = variant
        return variant

    return start


def only_run(store: str, variant: Variant) -> Read:
    (read,) = read_store(store, variant.folder / "cwd").values()
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
def test_one_run_with_each_row_once(store: str, faults: str, run: Run) -> None:
    whole, variant = run(store), run(store, FAULTS[faults])
    assert (whole.exit_code, variant.exit_code) == (0, 0), variant.tail()
    expected, found = only_run(store, whole), only_run(store, variant)
    assert {step for step, _ in expected.rows} == set(range(12))
    assert found.rows == expected.rows
    assert found.params == expected.params
    assert found.params["lr"] == "0.1"
    assert found.status == expected.status
    assert any(event.event == "restored" for event in variant.events)
    assert checkpoint(variant) == checkpoint(whole)
    assert "dirpath has changed" not in output(variant)
    assert "which run it writes to" not in output(variant)


def test_rows_up_to_an_error_are_logged(run: Run) -> None:
    """What was held when the program raised its own error is what a run under DDP would have logged before it."""
    whole, variant = run("journal"), run("journal", raise_at=5)
    assert variant.exit_code == 1
    expected, found = only_run("journal", whole), only_run("journal", variant)
    assert found.status == "failed"
    assert found.rows == [row for row in expected.rows if row[0] < 4 or (row[0] == 4 and "lr-SGD" in dict(row[1]))]
