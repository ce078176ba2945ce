"""What a vote costs: in shared memory, on one node and on two, and over gloo, as one all-reduce of all ranks.

The ranks only vote, one vote after the other, in blocks that alternate between the ways. Every process of a node has
its own interpreter, as in training. Takes half a minute.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.table import Column, Group, Table, each
from benchmarks.harness.world import answers_of
from lightning_ckptless.membership.worker.process_groups import use_loopback_on_one_node, world_group
from lightning_ckptless.replica.ballot_box import BallotBox
from lightning_ckptless.replica.node_transport import share_memory
from lightning_ckptless.replica.transport import GlooTransport, Transport

RANKS = (2, 4)
WAYS = ("gloo", "two nodes", "one node")
_WARM_UP_VOTES = 50
_TIMEOUT_S = 60.0


def vote(rank: int, ranks: int, folder: Path, votes: int, rounds: int) -> list[dict[str, Any]]:
    """Vote in turns over each transport, and return the seconds and CPU seconds per vote of each block."""
    torch.set_num_threads(1)
    use_loopback_on_one_node(ranks, ranks)
    dist.init_process_group("gloo", f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    gloo, boxes = GlooTransport(world_group()), list[BallotBox]()
    nodes = {"two nodes": [f"n{other * 2 // ranks}" for other in range(ranks)], "one node": ["n"] * ranks}
    transports: dict[str, Transport] = {"gloo": gloo} | {
        way: share_memory(
            gloo, names, folder, spread_name=partial(_spread, gloo, names), timeout_s=_TIMEOUT_S, when_open=boxes.append
        )
        for way, names in nodes.items()
    }
    blocks = []
    for number in range(rounds + 1):
        for way, transport in transports.items():
            gloo.gather(b"")
            began_at, used_s, count = time.perf_counter(), time.process_time(), votes if number else _WARM_UP_VOTES
            for _ in range(count):
                transport.vote(1)
            took_s, used_s = time.perf_counter() - began_at, time.process_time() - used_s
            blocks.append({"way": way, "us": took_s / count * 1e6, "cpu_us": used_s / count * 1e6})
    return blocks[len(WAYS) :]


def _spread(gloo: Transport, nodes: list[str], name: str) -> str:
    names = [said.decode() for said in gloo.gather(name.encode())]
    return next(said for said, node in zip(names, nodes, strict=True) if said and node == nodes[gloo.rank])


COLUMNS = (
    Column("vote", 0),
    Column("us per vote", each("us"), ".0f", median),
    Column("us of CPU per rank", each("cpu_us"), ".1f", median),
)
NOTE = "Medians over the blocks of all ranks. The CPU time is that of all threads of the process."


@dataclass
class Vote(Benchmark):
    votes: int = option(2000, "votes of a block", quick=100)
    rounds: int = option(5, "blocks of each way", quick=1)

    def measure(self, results: Results, steps: Steps) -> None:
        steps.expect(len(RANKS))
        for ranks in RANKS:
            steps.begin(f"{ranks} ranks")
            with TemporaryDirectory(dir="/dev/shm", prefix="ckptless-bench-") as folder:
                results[str(ranks)] = answers_of(ranks, vote, ranks, Path(folder), self.votes, self.rounds)
            steps.done()

    def tables(self, results: Results) -> list[Table]:
        rows = [
            Group(f"{ranks} ranks, {way}", [block for blocks in found for block in blocks if block["way"] == way])
            for ranks, found in results.items()
            for way in WAYS
        ]
        return [Table.of("Cost of a vote", rows, *COLUMNS, notes=[NOTE])]


if __name__ == "__main__":
    Vote.main()
