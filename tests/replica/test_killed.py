"""A process that is killed in the middle of a round."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_ckptless.protocol.versions import Complete, SlotState, Version, newest_complete
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.layout.layout import slot_views

WORKER = """
    import os, signal, sys, torch
    from pathlib import Path
    from lightning_ckptless.protocol.placement import place
    from lightning_ckptless.protocol.versions import Version
    from lightning_ckptless.replica.arena import Arena
    from lightning_ckptless.replica.layout.tensor_spec import describe
    from lightning_ckptless.replica.layout.planner import plan_layout
    from lightning_ckptless.replica.mirror.mirror import Mirror
    from lightning_ckptless.replica.transport import SoloTransport

    arena, moment = Arena.attach(Path(sys.argv[1])), sys.argv[2]
    tensors = {f"w{i}": torch.zeros(1000) for i in range(10)}
    layout = plan_layout([describe(tensors, replicated=True)])
    arena.write_layout(layout)

    def die(at, version):
        if at == moment and version.optimizer_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    mirror = Mirror(
        arena=arena, layout=layout, placement=place(["n"], 0), transport=SoloTransport(), generation=1, probe=die
    )
    for step in (1, 2, 3, 4):
        for tensor in tensors.values():
            tensor.fill_(step)
        mirror.submit(Version(step, True), tensors, b"blob")
        mirror.wait_staged()
    mirror.settle()
"""


@pytest.mark.parametrize(
    ("moment", "left", "state"),
    [("stage", 3, SlotState.WRITING), ("send", 4, SlotState.STAGED), ("committed", 4, SlotState.COMMITTED)],
)
def test_a_kill_leaves_one_complete_version(arena: Arena, moment: str, left: int, state: SlotState) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(arena.path), moment],
        env=environment,
        timeout=50,
        check=False,
    )
    assert worker.returncode == -signal.SIGKILL
    replicas = arena.inventory()
    assert {line.version.optimizer_step: line.state for line in replicas}[4] is state
    found = newest_complete(replicas)
    assert isinstance(found, Complete) and found.snapshot.version == Version(left, True)
    ((replica,),) = found.replicas
    assert arena.verify(replica) and arena.read_blob(replica) == b"blob"
    layout = arena.read_layout(replica.layout)
    assert layout is not None
    assert all(bool((view == left).all()) for view in slot_views(layout, 0, arena.read_bulk(replica)))
    if moment == "stage":
        torn = next(replica for replica in replicas if replica.version.optimizer_step == 4)
        values = torch.cat([view.flatten() for view in slot_views(layout, 0, arena.read_bulk(torn))])
        assert 4.0 in values and not bool((values == 4).all())  # killed half way indeed
