"""Elastic runs under torchrun: its agents restart all workers when a node leaves or joins; the state is reassembled."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.counting import largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed, rungs

TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--max-restarts", "5")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_a_lost_node_rejoins(words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    words = ("--samples", "240", "--pace", "0.5", *words)
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 2, *words)
    folder = tmp_path / "elastic"
    env = {
        f"node{number}": {"CKPTLESS_NNODES": "1:2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} for number in range(3)
    }
    nodes = Nodes(folder, stack, least=1, most=2, words=words, env=env, launcher=TORCHRUN)
    found = nodes.lose_and_rejoin(1, "node:rank=1:step=9", of=2, left=1)
    assert found.sizes == [2, 1, 2]
    assert rungs(nodes) == ["relaunch", "relaunch"]
    assert found.processes == 2 + 1 + 2
    assert found.steps == expected.steps
    assert [row["count"] for row in found.epochs] == [240, 240]
    assert largest_difference(expected, found) < BOUND
