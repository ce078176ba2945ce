"""Two nodes with unequal numbers of batches end with one error; a hung rank is found among the ranks of all nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.ledger import Event, read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.runner import record_for
from lightning_ckptless.testing.compare import compare_traces
from lightning_ckptless.testing.drill import run_variant
from tests.faults.cluster import END_S
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE
from tests.lab.parts import Options

SMALL = replace(BASE, devices=1, num_nodes=2, samples=24, logger="none")
UNEVEN = replace(SMALL, data="uneven", epochs=1)
FIX = "give every rank the same number of batches"


class TwoNodes:
    """Two agents in this process, with one worker each.

    Args:
        folder: receives all output.
        parent: the fork server of the workers.
    """

    def __init__(self, folder: Path, parent: ForkServer) -> None:
        self.folder = folder
        self._parent = parent

    def train(self, options: Options, faults: str = "") -> list[Outcome]:
        """Train to the end.

        Args:
            options: the training configuration.
            faults: a fault script.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with ThreadPoolExecutor(2) as pool:
            ends = [pool.submit(self._node, node, options, faults, store.port) for node in range(2)]
            return [end.result(timeout=END_S) for end in ends]

    def output(self, node: int) -> str:
        """Return the output of a node's worker."""
        return "\n".join(path.read_text() for path in (self.folder / f"output-{node}").rglob("std*.log"))

    def events(self, *kinds: str) -> list[Event]:
        """Return the ledger events of some kinds."""
        return [event for event in read_ledger(self.folder / "runs" / "two" / "ledger.jsonl") if event.event in kinds]

    def _node(self, node: int, options: Options, faults: str, port: int) -> Outcome:
        script, *arguments = command_for(options)
        config = LaunchConfig(
            program=Program("script", script, tuple(arguments)),
            nnodes="2",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_conf={"is_host": "0", "last_call_timeout": 1},
            run_id="two",
            node_name=f"node{node}",
            local_addr=f"127.0.0.{node + 1}",
            env={
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                "CKPTLESS_FAULTS": faults,
                "CKPTLESS_TRACE_DIR": str(self.folder / "trace"),
            },
            cwd=self.folder,
            run_root=self.folder / "runs",
            arena_dir=self.folder / "arenas",
            log_dir=self.folder / f"output-{node}",
            redirects="3",
        )
        return run(config, parent=self._parent, record=record_for(config))


def test_both_nodes_report_the_rank_that_runs_out_of_data(
    tmp_path: Path, parent: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = TwoNodes(tmp_path, parent)
    ends = nodes.train(UNEVEN)
    reason = f"rank 1 ran out of training data after step 3, rank 0 did not: {FIX}"
    assert [end.exit_code for end in ends] == [1, 1]
    assert capfd.readouterr().err.count(f"not relaunched: {reason}") == 2
    for node in range(2):
        assert f"UnevenStepsError: {reason}" in nodes.output(node)
    assert not nodes.events("hang", "node_lost", "relaunch")


def test_nodes_with_equal_data_end_without_error(tmp_path: Path, parent: ForkServer) -> None:
    nodes = TwoNodes(tmp_path, parent)
    assert [end.exit_code for end in nodes.train(SMALL)] == [0, 0]
    assert not nodes.events("hang", "node_lost", "relaunch", "fault")


@pytest.mark.long
def test_both_nodes_report_epochs_of_unequal_length(
    tmp_path: Path, parent: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first node waits in a callback after validation while the other waits in the next step."""
    nodes = TwoNodes(tmp_path, parent)
    ends = nodes.train(replace(UNEVEN, epochs=2, early_stopping=True, strategy_options="{'hang_timeout_s': 2}"))
    assert [end.exit_code for end in ends] == [1, 1]
    reason = f"rank 1 ran out of training data after step 3, rank 0 did not: {FIX}"
    assert capfd.readouterr().err.count(f"not relaunched: {reason}") == 2
    assert not nodes.events("hang", "node_lost", "relaunch")


@pytest.mark.long
def test_a_hung_rank_is_replaced_by_its_own_node(tmp_path: Path, parent: ForkServer) -> None:
    options = replace(SMALL, strategy_options="{'hang_timeout_s': 3}")
    nodes = TwoNodes(tmp_path, parent)
    ends = nodes.train(options, "hang:rank=1:step=4")
    assert [end.exit_code for end in ends] == [0, 0]
    (hang,) = nodes.events("hang")
    assert "lags at batch of step 4, behind the other ranks" in hang.fields["reason"]
    assert [event.fields["culprit_rank"] for event in nodes.events("recovery")] == [1]
    assert [end.in_place for end in ends] == [0, 1]
    env = {"PYTHONPATH": str(REPOSITORY), "CKPTLESS_FAILURE_DOMAIN": "r0"}
    command = command_for(replace(options, devices=2, num_nodes=1))
    undisturbed = run_variant(command, tmp_path / "undisturbed", nproc=2, parent=parent, isolate=True, env=env)
    assert undisturbed.exit_code == 0, undisturbed.tail()
    verdict = compare_traces(undisturbed.folder / "trace", tmp_path / "trace")
    assert verdict.identical, str(verdict)
