"""Nodes that join after the last step: they are admitted, or exit without training; no node waits forever."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S
from tests.faults.counting import account_of, largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed, rungs


def one_of_two_is_lost(
    folder: Path, stack: ExitStack, env: Mapping[str, Mapping[str, str]], *words: str
) -> tuple[Nodes, list[psutil.Popen]]:
    """Train on two nodes until the second is lost and the first has made a step alone; return both agents."""
    nodes = Nodes(folder, stack, least=1, most=2, words=words, env=env)
    agents = [nodes.start(number, "node:rank=1:step=5" if number else "") for number in range(2)]
    nodes.lose(agents[1])
    nodes.wait_for_world(1)
    return nodes, agents


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_a_node_that_joins_after_the_last_step_is_admitted(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer
) -> None:
    """The other node is notified in a hook after its last step, and returns to the recovery from there."""
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 2, *words)
    resume = tmp_path / "resume"
    env = {"node0": {"COUNTED_LINGERS_AT_EPOCH_END": str(resume)}}
    nodes, agents = one_of_two_is_lost(tmp_path / "elastic", stack, env, *words)
    nodes.wait_until((tmp_path / "resume-awaited").exists, "the first node has not reached the end of the last epoch")
    agents[1] = nodes.start(1)
    nodes.wait_until(lambda: len(nodes.cluster.events("fault")) == 2, "the first node was not notified of the second")
    resume.touch()
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    assert rungs(nodes) == ["in place", "in place"]
    assert nodes.cluster.events("joined_too_late") == []
    found = account_of(nodes.cluster.folder)
    assert found.processes == 2, "the first keeps its process, and the second trains no step"
    assert not nodes.cluster.events("hang")
    assert found.steps == expected.steps
    assert [row["count"] for row in found.epochs] == [120, 120]
    assert largest_difference(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("come", ["left", "end-awaited"], ids=["after=fit", "during=train_end"])
def test_a_node_that_joins_too_late_exits_with_the_others(come: str, tmp_path: Path, stack: ExitStack) -> None:
    """The node has joined and is on its way to the training loop when the others finish."""
    env = {"node2": {"COUNTED_LINGERS_AT_START": str(tmp_path / come)}}
    if come == "end-awaited":
        env["node0"] = {"COUNTED_LINGERS_AT_END": str(tmp_path / "end")}
    nodes, agents = one_of_two_is_lost(tmp_path, stack, env, "--samples", "120", "--pace", "0.5")
    agents[1] = nodes.start(1)
    nodes.wait_until(lambda: bool(nodes.cluster.events("joined_too_late")), "the second node waits forever")
    (tmp_path / "end").touch()
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    assert [(fields["stay"], fields["come"]) for fields in nodes.cluster.events("move")][-1] == ([0], [1])
    assert len(nodes.cluster.events("joined_too_late")) == 1
    assert account_of(tmp_path).sizes == [2, 1]
    assert rungs(nodes) == ["in place"]
