"""Nodes that are lost and nodes that rejoin: every sample is used once per epoch, whatever the world size."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from tests.faults.cluster import END_S
from tests.faults.counting import Account, account_of, largest_difference
from tests.faults.elastic import BOUND, Nodes, run_undisturbed, rungs, start

SAMPLES = 360
PACED = ("--samples", str(SAMPLES), "--pace", "0.25")
SCALE = ("--strategy-options", "{'elastic_batch': 'scale'}")


def shrink_and_grow(folder: Path, stack: ExitStack, *words: str) -> Account:
    """Train on four nodes; one is lost with its arena and rejoins."""
    nodes = Nodes(folder, stack, least=3, most=4, words=words)
    found = nodes.lose_and_rejoin(3, "node:rank=3:step=9", of=4, left=3)
    assert found.sizes == [4, 3, 4]
    assert rungs(nodes) == ["in place"] * 2
    assert found.processes == 4 + 1, "the survivors keep their processes"
    changed = nodes.cluster.events("world_changed")
    assert [(fields["before"], fields["world_size"]) for fields in changed] == [(4, 3), (3, 4)]
    shrunk, grown = (fields["phases"] for fields in nodes.cluster.events("recovery"))
    assert shrunk["detect_s"] > 0
    assert grown["detect_s"] == 0, "no rank was lost when the node rejoined"
    return found


def every_sample_once(account: Account) -> bool:
    """Whether every sample was used exactly once per epoch."""
    seen: dict[int, Counter[int]] = {}
    for (epoch, _), samples in account.steps.items():
        seen.setdefault(epoch, Counter()).update(samples)
    return list(seen.values()) == [Counter(range(SAMPLES))] * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(("--accumulate", "2"), marks=pytest.mark.long),
        pytest.param(("--sharded",), marks=pytest.mark.long),
        pytest.param(("--strategy-options", "{'device_tier': 'on'}"), marks=pytest.mark.long),
    ],
    ids=["ddp", "accumulated", "fsdp2", "device_tier"],
)
def test_a_lost_node_rejoins(words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 4, *PACED, *words)
    found = shrink_and_grow(tmp_path / "elastic", stack, *PACED, *words)
    assert found.steps == expected.steps
    assert every_sample_once(found)
    assert [row["count"] for row in found.epochs] == [SAMPLES, SAMPLES]
    assert [row["loss"] for row in found.epochs] == pytest.approx([row["loss"] for row in expected.epochs], rel=1e-6)
    assert largest_difference(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_the_lost_node_of_rank_0_rejoins(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer
) -> None:
    """Another node takes over rank 0 with a new worker; the third worker stays. When the node rejoins, both stay."""
    words = ("--samples", "360", "--pace", "0.25", *words)
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 3, *words)
    folder = tmp_path / "elastic"
    nodes = Nodes(folder, stack, least=2, most=3, words=words)
    found = nodes.lose_and_rejoin(0, "node:rank=0:step=9", of=3, left=2)
    assert found.sizes == [3, 2, 3]
    assert rungs(nodes) == ["in place", "in place"]
    assert found.processes == 3 + 1 + 1
    moves = {json.dumps([fields["stay"], fields["come"]]) for fields in nodes.cluster.events("move")}
    assert moves == {"[[1], [0]]", "[[0, 1], [2]]"}
    assert found.steps == expected.steps
    assert [row["loss"] for row in found.epochs] == pytest.approx([row["loss"] for row in expected.epochs], rel=1e-6)
    assert largest_difference(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mesh_shrinks_by_a_row_and_grows_back(tmp_path: Path, stack: ExitStack, parent: ForkServer) -> None:
    """FSDP2 with tensor parallelism on two nodes of two ranks; one node is lost and rejoins."""
    words = ("--samples", "240", "--pace", "0.5", "--sharded", "--tensor", "2")
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 4, *words)
    folder = tmp_path / "elastic"
    nodes = Nodes(folder, stack, least=1, most=2, devices=2, words=words)
    found = nodes.lose_and_rejoin(1, "node:rank=3:step=9", of=2, left=2)
    assert found.sizes == [4, 2, 4]
    assert rungs(nodes) == ["in place"] * 2
    assert found.processes == 4 + 2
    assert found.steps == expected.steps
    assert largest_difference(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_four_nodes_shrink_to_one_and_grow_back(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: ForkServer
) -> None:
    """Three nodes, among them that of rank 0, are lost one by one, each after the shards have been rereplicated."""
    words = ("--samples", str(SAMPLES), "--pace", "0.5", *words)
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 4, *words)
    folder = tmp_path / "elastic"
    nodes = Nodes(folder, stack, least=1, most=4, words=words)
    losses = {3: "node:rank=3:step=5", 0: "node:rank=0:step=10", 1: "node:rank=1:step=15"}
    agents = [nodes.start(number, losses.get(number, "")) for number in range(4)]
    for number, left in zip(losses, (3, 2, 1), strict=True):
        nodes.lose(agents[number])
        nodes.wait_for_world(left)
    for number in losses:
        agents[number] = nodes.start(number)
    assert [agent.wait(timeout=END_S) for agent in agents] == [0] * 4, nodes.cluster.output()
    found = account_of(folder)
    assert (found.sizes[:4], found.sizes[-1]) == ([4, 3, 2, 1], 4)
    assert set(rungs(nodes)) == {"in place"}
    assert found.processes == 4 + 1 + 3, "rank 0 is replaced by a new process, survivors keep theirs"
    assert not nodes.cluster.events("hang")
    assert found.steps == expected.steps
    assert every_sample_once(found)
    assert largest_difference(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_elastic_batch_scale_reduces_the_samples_per_step(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack
) -> None:
    found = shrink_and_grow(tmp_path / "elastic", stack, *PACED, *SCALE, *words)
    assert every_sample_once(found)
    assert [row["count"] for row in found.epochs] == [SAMPLES, SAMPLES]
    scaled = [json.loads(line) for path in found.folder.glob("scaled-*") for line in path.read_text().splitlines()]
    assert Counter(map(tuple, scaled)) == {(4, 3): 3, (3, 4): 4}


DURABLE = ("--samples", "180", "--strategy-options", "{'durable_every_n_steps': 2}")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.long
@pytest.mark.parametrize("words", [DURABLE, (*DURABLE, "--sharded")], ids=["ddp", "fsdp2"])
def test_two_ranks_resume_from_a_durable_state_of_three(
    words: tuple[str, ...], tmp_path: Path, parent: ForkServer
) -> None:
    expected = run_undisturbed(tmp_path / "undisturbed", parent, 3, *words)
    folder = tmp_path / "run"
    (folder / "arenas").mkdir(parents=True)
    assert start(folder, parent, 3, *words, faults="kill:rank=1:step=9").exit_code == 128 + 9
    shutil.rmtree(folder / "arenas")
    assert start(folder, parent, 2, *words).exit_code == 0
    found = account_of(folder)
    assert found.sizes == [3, 2]
    assert found.steps == expected.steps
    assert [row["count"] for row in found.epochs] == [180.0, 180.0]
    assert largest_difference(expected, found) < BOUND
    (last,) = [e.fields for e in read_ledger(folder / "runs" / "run" / "ledger.jsonl", only="run_started").events][1:]
    assert "durable state" in last["reason"] and "written by 3 ranks, resumed on 2" in last["reason"]


@pytest.mark.timeout(100)
def test_more_ranks_than_virtual_ranks_are_refused(tmp_path: Path, parent: ForkServer) -> None:
    folder = tmp_path / "run"
    (folder / "arenas").mkdir(parents=True)
    start(folder, parent, 2, *DURABLE, faults="kill:rank=1:step=5")
    shutil.rmtree(folder / "arenas")
    assert start(folder, parent, 3, *DURABLE).exit_code == 1
    output = "".join(path.read_text() for path in (folder / "output-3").rglob("*.log"))
    assert "2 virtual ranks, but 3 ranks were started" in output


@pytest.mark.timeout(100)
def test_manual_optimization_cannot_start_with_fewer_ranks(tmp_path: Path, parent: ForkServer) -> None:
    (tmp_path / "arenas").mkdir()
    assert start(tmp_path, parent, 1, "--nodes", "2", "--manual", nnodes="1:2").exit_code == 1
    output = "".join(path.read_text() for path in (tmp_path / "output-1").rglob("*.log"))
    assert "a rank cannot run two: the model steps its optimizers itself" in output


CARRIED = ("--samples", "180")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "words", [CARRIED, pytest.param((*CARRIED, *SCALE), marks=pytest.mark.long)], ids=["keep", "scale"]
)
def test_results_are_identical_after_a_fault_with_fewer_ranks(
    words: tuple[str, ...], tmp_path: Path, parent: ForkServer
) -> None:
    """Rank 0 runs two virtual ranks; rank 1 is killed during mirroring."""
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder, faults in zip(folders, ("", "kill:rank=0:step=12,kill:rank=1:step=15:at=mirror"), strict=True):
        (folder / "arenas").mkdir(parents=True)
        assert start(folder, parent, 3, *words, faults="kill:rank=2:step=7").exit_code == 128 + 9
        outcome = start(folder, parent, 2, *words, faults=faults, max_restarts=3)
        assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 0, 2 if faults else 0)
    undisturbed, killed = map(account_of, folders)
    assert undisturbed.sizes == killed.sizes == [3, 2]
    assert undisturbed.steps == killed.steps
    assert undisturbed.epochs == killed.epochs
    assert largest_difference(undisturbed, killed) == 0
