"""Kills of ranks that train on a device, each run compared bit for bit with the undisturbed run."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.replica.arena_space import default_arena_dir
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import Ladder
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.trace_reader import read_traces
from tests.device.hosts import HOSTS
from tests.faults.cluster import END_S, Cluster
from tests.faults.conftest import Drill, drill, parent  # noqa: F401 - fixtures
from tests.faults.matrix import BASE, Cell
from tests.lab.parts import Options

ALONE = replace(BASE, accelerator="gpu", devices=1)
"""One rank: every fault leads to a relaunch from its own arena."""

CELLS = {
    "during=optimizer_step": Cell("kill:rank=0:step=4:at=optimizer_step", ALONE),
    "during=mirror": Cell("kill:rank=0:step=5:at=mirror", ALONE),
    "during=validation-data=pinned": Cell(
        "kill:rank=0:step=7:at=validation", replace(ALONE, workers=2, pin_memory=True, val_interval=7)
    ),
    "staging=device": Cell(
        "kill:rank=0:step=5", replace(ALONE, strategy_options="{'staging': 'device', 'mirror_every_n_steps': 2}")
    ),
    "precision=16": Cell("kill:rank=0:step=5", replace(ALONE, precision="16-mixed", clip=0.1)),
    "precision=bf16": Cell("kill:rank=0:step=5", replace(ALONE, precision="bf16-mixed", ema=True)),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_kill(cell: Cell, drill: Drill) -> None:  # noqa: F811 - the fixture
    report = drill(cell, Ladder())
    assert report.verdict.identical, report
    assert len(report.recoveries) == 1


TWO_NODES = replace(BASE, samples=80, accelerator="gpu", devices=1, num_nodes=2)
"""Two ranks on one device, each on its own node."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _run(folder, TWO_NODES, "")
    return folder


def _run(folder: Path, options: Options, faults: str, *words: str) -> list[str]:
    """Run two nodes to the end and return the kinds of events in the ledger."""
    with ExitStack() as stack:
        arenas = stack.enter_context(tempfile.TemporaryDirectory(dir=default_arena_dir()))
        cluster = Cluster(folder, stack, options, HOSTS, words, Path(arenas))
        agents = [cluster.start_agent(faults) for _ in range(2)]
        assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], cluster.output()
        collect_logs(read_traces(folder / "trace").values(), folder / "logs", since=0)
    return [event.event for event in read_ledger(folder / "runs" / "two-nodes" / "ledger.jsonl")]


IN_PLACE = {
    "rank=1-then=rank_0": ("kill:rank=1:step=5,kill:rank=0:step=9", ()),
    "rank=0-during=backward": ("kill:rank=0:step=6:at=backward", ()),
    "rank=1-during=mirror-standbys=1": ("kill:rank=1:step=7:at=mirror", ("--standbys", "1")),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("faults", "words"), IN_PLACE.values(), ids=IN_PLACE.keys())
def test_kill_in_place(faults: str, words: tuple[str, ...], undisturbed: Path, tmp_path: Path) -> None:
    events = _run(tmp_path, TWO_NODES, faults, *words)
    assert events.count("in_place") == len(faults.split(","))
    assert "relaunch" not in events
    verdict = compare(undisturbed, tmp_path)
    assert verdict.identical, verdict


@pytest.mark.timeout(240)
def test_kill_of_all_ranks(undisturbed: Path, tmp_path: Path) -> None:
    _run(tmp_path, TWO_NODES, "kill:rank=all:step=5")
    verdict = compare(undisturbed, tmp_path)
    assert verdict.identical, verdict
