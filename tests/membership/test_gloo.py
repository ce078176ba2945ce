"""Process groups over relaunches: each generation has a store without the addresses of dead ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from tests.membership.conftest import script

RELAUNCHES = 10

# One rank after the other kills itself once the group has worked; a generation in which it does not work fails the run.
TRAIN = f"""
    import os, signal
    import torch
    import torch.distributed as dist
    from lightning_ckptless.membership.worker.process_groups import World, use_loopback_on_one_node

    rank, count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    use_loopback_on_one_node(2, 2)
    generation = World().open(rank=rank, world_size=2, backend="gloo", timeout=None, device=None)
    total = torch.ones(1) * (rank + 1)
    dist.all_reduce(total)
    assert total.item() == 3
    with open(f"generations-{{rank}}", "a") as file:
        print(generation, file=file)
    dist.barrier()
    if count < {RELAUNCHES} and rank == count % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
"""


@pytest.mark.long
def test_ten_relaunches(parent: ForkServer, write: Callable[..., Path], tmp_path: Path) -> None:
    config = LaunchConfig(program=script(write(TRAIN)), nproc=2, cwd=tmp_path, max_restarts=RELAUNCHES)
    outcome = run(config, parent=parent)
    assert (outcome.exit_code, outcome.restarts) == (0, RELAUNCHES)
    assert [fault.rank for fault in outcome.faults] == [count % 2 for count in range(RELAUNCHES)]
    for rank in (0, 1):
        numbers = (tmp_path / f"generations-{rank}").read_text().split()
        assert numbers == [str(number) for number in range(1, RELAUNCHES + 2)]
