"""Nodes that come when the others have made their last step: they are met, or end with nothing done; nobody waits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S
from tests.faults.counting import account_of, furthest
from tests.faults.elastic import BOUND, Nodes, rungs, whole


def one_of_two_is_lost(
    folder: Path, stack: ExitStack, env: Mapping[str, Mapping[str, str]], *words: str
) -> tuple[Nodes, list[psutil.Popen]]:
    """Two nodes train, the second is lost, the first makes a step alone. Returns both agents."""
    nodes = Nodes(folder, stack, least=1, most=2, words=words, env=env)
    agents = [nodes.start(number, "node:rank=1:step=5" if number else "") for number in range(2)]
    nodes.lose(agents[1])
    nodes.wait_for_world(1)
    return nodes, agents


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_a_node_comes_at_the_last_moment(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer
) -> None:
    """The others have made their last step, and are told behind it, in their hooks: they come back from there."""
    expected = whole(tmp_path / "whole", parent, 2, *words)
    go_on = tmp_path / "go_on"
    env = {"node0": {"COUNTED_LINGERS_AT_EPOCH_END": str(go_on)}}
    nodes, agents = one_of_two_is_lost(tmp_path / "elastic", stack, env, *words)
    nodes.wait_until((tmp_path / "go_on-awaited").exists, "the first node has not come to the end of the last epoch")
    agents[1] = nodes.start(1)
    nodes.wait_until(lambda: len(nodes.cluster.events("fault")) == 2, "nobody was told of the second node's coming")
    go_on.touch()
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    assert rungs(nodes) == ["in place", "in place"]
    assert nodes.cluster.events("joined_too_late") == []
    found = account_of(nodes.cluster.folder)
    assert found.processes == 2, "the first stays, and the second trains no step"
    assert not nodes.cluster.events("hang")
    assert found.steps == expected.steps
    assert [row["count"] for row in found.epochs] == [120, 120]
    assert furthest(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("come", ["left", "end-awaited"], ids=["behind=fit", "during=train_end"])
def test_a_node_that_comes_too_late_ends_with_the_others(come: str, tmp_path: Path, stack: ExitStack) -> None:
    """It is one of the nodes, and on its way to the loop, when those that train are at their end."""
    env = {"node2": {"COUNTED_LINGERS_AT_START": str(tmp_path / come)}}
    if come == "end-awaited":
        env["node0"] = {"COUNTED_LINGERS_AT_END": str(tmp_path / "end")}
    nodes, agents = one_of_two_is_lost(tmp_path, stack, env, "--samples", "120", "--pace", "0.5")
    agents[1] = nodes.start(1)
    nodes.wait_until(lambda: bool(nodes.cluster.events("joined_too_late")), "the second node waits for ever")
    (tmp_path / "end").touch()
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    assert [(fields["stay"], fields["come"]) for fields in nodes.cluster.events("move")][-1] == ([0], [1])
    assert len(nodes.cluster.events("joined_too_late")) == 1
    assert account_of(tmp_path).sizes == [2, 1]
    assert rungs(nodes) == ["in place"]
