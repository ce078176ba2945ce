"""Nodes that are lost and not replaced, and nodes that come back: every sample once, whatever the world was."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.job import record_for
from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.launch import LaunchConfig, Outcome, run
from lightning_ckptless.membership.parent import PreloadedParent
from lightning_ckptless.membership.program import Program
from lightning_ckptless.testing.drill import run_variant
from tests.faults.cluster import END_S, Cluster, free_port
from tests.faults.conftest import REPOSITORY
from tests.faults.counting import COUNTED, Account, account_of, furthest
from tests.lab.parts import Options

BOUND = 2e-6
"""Largest difference of a weight of size one, after all steps: sums over ranks in another order."""
LOOK_S = 0.1


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends with the test."""
    with ExitStack() as stack:
        yield stack


def command(folder: Path, nodes: int, devices: int, *words: str) -> tuple[str, ...]:
    """A counted run that has as many ranks when all nodes are there."""
    return (str(COUNTED), "--folder", str(folder), "--nodes", str(nodes), "--devices", str(devices), *words)


def whole(folder: Path, parent: PreloadedParent, ranks: int, *words: str) -> Account:
    """The run that loses nobody."""
    folder.mkdir()
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    variant = run_variant(
        list(command(folder, 1, ranks, *words)), folder / "run", nproc=ranks, parent=parent, isolate=True, env=env
    )
    assert variant.exit_code == 0, variant.tail()
    return account_of(folder)


def start(
    folder: Path,
    parent: PreloadedParent,
    ranks: int,
    *words: str,
    faults: str = "",
    max_restarts: int = 0,
    nnodes: str = "1",
) -> Outcome:
    """Start a counted run on one machine, under the run id that it has in this folder, and wait for its end."""
    script, *arguments = command(folder, 1, ranks, *words)
    config = LaunchConfig(
        program=Program("script", script, tuple(arguments)),
        nproc=ranks,
        run_id=folder.name,
        max_restarts=max_restarts,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CKPTLESS_FAULTS": faults},
        nnodes=nnodes,
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_conf={"last_call_timeout": 1},
        cwd=folder,
        run_root=folder / "runs",
        arena_dir=folder / "arenas",
        log_dir=folder / f"output-{ranks}",
        redirects="3",
    )
    return run(config, parent=parent, record=record_for(config))


class Nodes:
    """Nodes that go on with fewer; they meet at a place which none of them hosts."""

    def __init__(
        self,
        folder: Path,
        stack: ExitStack,
        *,
        least: int,
        most: int,
        devices: int = 1,
        words: tuple[str, ...] = (),
        env: Mapping[str, Mapping[str, str]] = {},
    ) -> None:
        self.meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        run = command(folder, most, devices, *words)
        nodes = ("--nnodes", f"{least}:{most}", "--nproc-per-node", str(devices))
        self.cluster = Cluster(
            folder, stack, Options(), env, words=nodes, port=self.meeting.port, hosted=True, command=run
        )  # fmt: skip
        self.cluster.arenas.mkdir()
        self.agents: list[psutil.Popen] = []

    def start(self, number: int, faults: str = "") -> psutil.Popen:
        """Start a node; ranks are in the order of nodes."""
        agent = self.cluster.start_agent(faults, f"127.0.0.{number + 1}")
        self.agents.append(agent)
        return agent

    def lose(self, agent: psutil.Popen) -> None:
        """Wait until a node is lost, and take what it had away."""
        assert agent.wait(timeout=END_S) == -signal.SIGKILL, self.cluster.output()
        self.cluster.lose(agent)

    def lose_and_bring_back(self, lost: int, fault: str, *, of: int, left: int) -> Account:
        """Train to the end on so many nodes, of which one is lost with all it has, and comes back.

        Args:
            lost: the node.
            fault: that ends it.
            of: number of nodes.
            left: ranks that go on without it.
        """
        agents = [self.start(number, fault if number == lost else "") for number in range(of)]
        self.lose(agents[lost])
        self.wait_for_world(left)
        agents[lost] = self.start(lost)
        assert [agent.wait(timeout=END_S) for agent in agents] == [0] * of, self.cluster.output()
        return account_of(self.cluster.folder)

    def wait_for_world(self, size: int) -> None:
        """Until so many ranks have made a step."""
        for _ in range(round(END_S / LOOK_S)):
            if size in account_of(self.cluster.folder).worlds.values():
                return
            threading.Event().wait(LOOK_S)
        raise AssertionError(f"no step of {size} ranks:\n{self.cluster.output()}")


SAMPLES = 720
PACED = ("--samples", str(SAMPLES), "--pace", "0.25")
SCALE = ("--strategy-options", "{'elastic_batch': 'scale'}")


def shrink_and_grow(folder: Path, stack: ExitStack, *words: str) -> Account:
    """Four nodes train, one is lost with all it has, three go on, it comes back."""
    folder.mkdir()
    nodes = Nodes(folder, stack, least=3, most=4, words=words)
    found = nodes.lose_and_bring_back(3, "node:rank=3:step=9", of=4, left=3)
    assert found.sizes == [4, 3, 4]
    assert rungs(nodes) == ["in place"] * 2
    assert found.processes == 4 + 1, "the others stay"
    changed = nodes.cluster.events("world_changed")
    assert [(fields["before"], fields["world_size"]) for fields in changed] == [(4, 3), (3, 4)]
    shrunk, grown = (fields["phases"] for fields in nodes.cluster.events("recovery"))
    assert shrunk["detect_s"] > 0
    assert grown["detect_s"] == 0, "nobody was lost when the node came back"
    return found


def rungs(nodes: Nodes) -> list[str]:
    """The rung of each recovery."""
    return [str(fields["rung"]) for fields in nodes.cluster.events("recovery")]


def each_once(account: Account) -> bool:
    """Whether every sample came once in every epoch."""
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
    ],
    ids=["ddp", "accumulated", "fsdp2"],
)
def test_a_node_is_lost_and_comes_back(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: PreloadedParent
) -> None:
    expected = whole(tmp_path / "whole", parent, 4, *PACED, *words)
    found = shrink_and_grow(tmp_path / "elastic", stack, *PACED, *words)
    assert found.steps == expected.steps
    assert each_once(found)
    assert [row["count"] for row in found.epochs] == [SAMPLES, SAMPLES]
    assert [row["loss"] for row in found.epochs] == pytest.approx([row["loss"] for row in expected.epochs], rel=1e-6)
    assert furthest(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_the_node_of_rank_0_is_lost_and_comes_back(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: PreloadedParent
) -> None:
    """Another one becomes that of rank 0: its worker starts anew, that of the third stays, as both do later."""
    words = ("--samples", "360", "--pace", "0.25", *words)
    expected = whole(tmp_path / "whole", parent, 3, *words)
    folder = tmp_path / "elastic"
    folder.mkdir()
    nodes = Nodes(folder, stack, least=2, most=3, words=words)
    found = nodes.lose_and_bring_back(0, "node:rank=0:step=9", of=3, left=2)
    assert found.sizes == [3, 2, 3]
    assert rungs(nodes) == ["in place", "in place"]
    assert found.processes == 3 + 1 + 1
    moves = {json.dumps([fields["stay"], fields["come"]]) for fields in nodes.cluster.events("move")}
    assert moves == {"[[1], [0]]", "[[0, 1], [2]]"}
    assert found.steps == expected.steps
    assert [row["loss"] for row in found.epochs] == pytest.approx([row["loss"] for row in expected.epochs], rel=1e-6)
    assert furthest(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mesh_loses_a_row(tmp_path: Path, stack: ExitStack, parent: PreloadedParent) -> None:
    """FSDP2 beside tensor parallelism: two nodes of two ranks, of which one is lost and comes back."""
    words = ("--samples", "240", "--pace", "0.5", "--sharded", "--tensor", "2")
    expected = whole(tmp_path / "whole", parent, 4, *words)
    folder = tmp_path / "elastic"
    folder.mkdir()
    nodes = Nodes(folder, stack, least=1, most=2, devices=2, words=words)
    found = nodes.lose_and_bring_back(1, "node:rank=3:step=9", of=2, left=2)
    assert found.sizes == [4, 2, 4]
    assert rungs(nodes) == ["in place"] * 2
    assert found.processes == 4 + 2
    assert found.steps == expected.steps
    assert furthest(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_one_node_of_four_is_left_and_all_come_back(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack, parent: PreloadedParent
) -> None:
    """Three are lost one by one, that of rank 0 among them; each time what it held was protected anew by then."""
    words = ("--samples", str(SAMPLES), "--pace", "0.5", *words)
    expected = whole(tmp_path / "whole", parent, 4, *words)
    folder = tmp_path / "elastic"
    folder.mkdir()
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
    assert found.steps == expected.steps
    assert each_once(found)
    assert furthest(expected, found) < BOUND


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
def test_steps_of_fewer_samples(words: tuple[str, ...], tmp_path: Path, stack: ExitStack) -> None:
    found = shrink_and_grow(tmp_path / "elastic", stack, *PACED, *SCALE, *words)
    assert each_once(found)
    assert [row["count"] for row in found.epochs] == [SAMPLES, SAMPLES]
    told = [json.loads(line) for path in found.folder.glob("scaled-*") for line in path.read_text().splitlines()]
    assert Counter(map(tuple, told)) == {(4, 3): 3, (3, 4): 4}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_node_that_comes_too_late_ends_with_the_others(tmp_path: Path, stack: ExitStack) -> None:
    """It is one of the nodes, and on its way to the loop, when those that train are at their end."""
    words = ("--samples", "120", "--pace", "0.5")
    late = {"node2": {"COUNTED_AWAITS": str(tmp_path / "left")}}
    nodes = Nodes(tmp_path, stack, least=1, most=2, words=words, env=late)
    agents = [nodes.start(number, "node:rank=1:step=5" if number else "") for number in range(2)]
    nodes.lose(agents[1])
    nodes.wait_for_world(1)
    agents[1] = nodes.start(1)
    assert [agent.wait(timeout=END_S) for agent in agents] == [0, 0], nodes.cluster.output()
    assert [(fields["stay"], fields["come"]) for fields in nodes.cluster.events("move")][-1] == ([0], [1])
    assert len(nodes.cluster.events("came_too_late")) == 1
    assert account_of(tmp_path).sizes == [2, 1]
    assert rungs(nodes) == ["in place"]


DURABLE = ("--samples", "180", "--strategy-options", "{'durable_every_n_steps': 2}")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "words", [DURABLE, pytest.param((*DURABLE, "--sharded"), marks=pytest.mark.long)], ids=["ddp", "fsdp2"]
)
def test_a_durable_state_of_three_ranks_starts_two(
    words: tuple[str, ...], tmp_path: Path, parent: PreloadedParent
) -> None:
    expected = whole(tmp_path / "whole", parent, 3, *words)
    folder = tmp_path / "run"
    (folder / "arenas").mkdir(parents=True)
    assert start(folder, parent, 3, *words, faults="kill:rank=1:step=9").exit_code == 128 + 9
    shutil.rmtree(folder / "arenas")
    assert start(folder, parent, 2, *words).exit_code == 0
    found = account_of(folder)
    assert found.sizes == [3, 2]
    assert found.steps == expected.steps
    assert [row["count"] for row in found.epochs] == [180.0, 180.0]
    assert furthest(expected, found) < BOUND
    (last,) = [e.fields for e in read_ledger(folder / "runs" / "run" / "ledger.jsonl", only="run_started").events][1:]
    assert "durable state" in last["reason"] and "written by 3 ranks, 2 go on" in last["reason"]


@pytest.mark.timeout(100)
def test_more_ranks_than_streams_are_refused(tmp_path: Path, parent: PreloadedParent) -> None:
    folder = tmp_path / "run"
    (folder / "arenas").mkdir(parents=True)
    start(folder, parent, 2, *DURABLE, faults="kill:rank=1:step=5")
    shutil.rmtree(folder / "arenas")
    assert start(folder, parent, 3, *DURABLE).exit_code == 1
    output = "".join(path.read_text() for path in (folder / "output-3").rglob("*.log"))
    assert "2 streams of samples, 3 ranks are started" in output


@pytest.mark.timeout(100)
def test_a_model_that_steps_by_itself_does_not_begin_with_fewer(tmp_path: Path, parent: PreloadedParent) -> None:
    (tmp_path / "arenas").mkdir()
    assert start(tmp_path, parent, 1, "--nodes", "2", "--manual", nnodes="1:2").exit_code == 1
    output = "".join(path.read_text() for path in (tmp_path / "output-1").rglob("*.log"))
    assert "a rank cannot carry two: the model steps its optimizers itself" in output


CARRIED = ("--samples", "180")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "words", [CARRIED, pytest.param((*CARRIED, *SCALE), marks=pytest.mark.long)], ids=["keep", "scale"]
)
def test_a_fault_among_fewer_ranks_changes_no_bit(
    words: tuple[str, ...], tmp_path: Path, parent: PreloadedParent
) -> None:
    """Rank 0 carries two streams, rank 1 is killed while it mirrors."""
    folders = [tmp_path / "untouched", tmp_path / "killed"]
    for folder, faults in zip(folders, ("", "kill:rank=0:step=12,kill:rank=1:step=15:at=mirror"), strict=True):
        (folder / "arenas").mkdir(parents=True)
        assert start(folder, parent, 3, *words, faults="kill:rank=2:step=7").exit_code == 128 + 9
        outcome = start(folder, parent, 2, *words, faults=faults, max_restarts=3)
        assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 0, 2 if faults else 0)
    untouched, killed = map(account_of, folders)
    assert untouched.sizes == killed.sizes == [3, 2]
    assert untouched.steps == killed.steps
    assert untouched.epochs == killed.epochs
    assert furthest(untouched, killed) == 0
