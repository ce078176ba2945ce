"""What a standby does before it has a rank."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.agent_channel import Received
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.messages import AssignRank, Message, StandbyReady
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.layout import layout as layout_module
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.trainer.session.standby import wait_for_rank


class Channel:
    """Assigns a rank as soon as the standby is ready."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        """Keep a message."""
        self.sent.append(message)

    def receive(self) -> Received:
        """Assign a rank."""
        return Received(AssignRank(1, {}, {"RANK": "3"}), [])


def test_a_standby_parses_the_layouts_of_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plan_layout([describe({"weight": torch.zeros(3, 5)}, replicated=True)])
    arena = Arena.create(tmp_path, "run", "node", Owner.of(os.getpid()))
    arena.write_layout(layout)
    set_there = {
        "TORCHELASTIC_RUN_ID": "run",
        environment.NODE: "node",
        environment.AGENT: str(os.getpid()),
        environment.RUN_ROOT: str(tmp_path),
        environment.STANDBY: "1",
        environment.HIDDEN_STREAMS: "",
        environment.FIT_INDEX: "0",
        "RANK": "0",
    }
    for name, value in set_there.items():
        monkeypatch.setenv(name, value)
    ranks: list[str] = []
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        options=CkptlessOptions(arena_dir=tmp_path),
        set_world_ranks=lambda: ranks.append(os.environ["RANK"]),
    )
    channel: Any = Channel()
    wait_for_rank(channel, strategy, SimpleNamespace(default_root_dir=str(tmp_path)))
    assert (channel.sent, ranks) == ([StandbyReady()], ["3"])

    def refuse(*_: object) -> Layout:
        raise AssertionError("the layout is parsed again")

    monkeypatch.setattr(Layout, "from_bytes", refuse)
    found = Arena.attach(arena.path).read_layout(layout.digest)
    assert found is not None and found.chunks == layout.chunks
    monkeypatch.setattr(layout_module, "_hull", refuse)
    assert found.held_by(3)["weight"].shape == (3, 5)
