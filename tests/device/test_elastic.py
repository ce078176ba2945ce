"""A node whose rank trains on a device is lost and rejoins."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.device.hosts import HOSTS
from tests.faults.cluster import END_S
from tests.faults.counting import Account, account_of, largest_difference
from tests.faults.elastic import Nodes, rungs

WORDS = ("--samples", "360", "--pace", "0.5", "--accelerator", "gpu")
BOUND = 1e-5
"""Largest difference of a weight, since ranks are summed in a different order."""


def two_nodes(folder: Path, stack: ExitStack, words: tuple[str, ...]) -> Nodes:
    """Create the folder and return two nodes, either of which can continue alone."""
    folder.mkdir()
    return Nodes(folder, stack, least=1, most=2, words=words, env=HOSTS)


def run_undisturbed(folder: Path, stack: ExitStack, words: tuple[str, ...]) -> Account:
    """Run without faults and return the result."""
    nodes = two_nodes(folder, stack, words)
    agents = [nodes.start(0), nodes.start(1)]
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    return account_of(folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_a_lost_node_rejoins(words: tuple[str, ...], tmp_path: Path, stack: ExitStack) -> None:
    expected = run_undisturbed(tmp_path / "undisturbed", stack, (*WORDS, *words))
    nodes = two_nodes(tmp_path / "elastic", stack, (*WORDS, *words))
    found = nodes.lose_and_rejoin(1, "node:rank=1:step=9", of=2, left=1)
    assert found.sizes == [2, 1, 2]
    assert rungs(nodes) == ["in place", "in place"]
    assert found.processes == 2 + 1, "the survivor keeps its process"
    assert found.steps == expected.steps
    difference = largest_difference(expected, found)
    print(f"largest difference of a weight: {difference:.2g}")
    assert difference < BOUND
