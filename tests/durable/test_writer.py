"""The durable writer as a real process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.durable.folder import DurableFolder
from lightning_ckptless.durable.writer_settings import MODULE, WriterSettings
from lightning_ckptless.ledger import Event, read_ledger
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.transport import SoloTransport

REPOSITORY = Path(__file__).parents[2]


class Training:
    """A single rank that makes steps on request."""

    def __init__(self, folder: Path) -> None:
        self.arena = Arena.create(folder, "run", "node", Owner.of(os.getpid()))
        self.tensors = {"weight": torch.zeros(300, 100), "bias": torch.zeros(50)}
        layout = plan_layout([describe(self.tensors, replicated=True)])
        self.arena.write_layout(layout)
        self.mirror = Mirror(
            arena=self.arena, layout=layout, placement=place(["n"], 0), transport=SoloTransport(), generation=1
        )

    def step_to(self, step: int) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(step)
        self.mirror.submit(Version(step, True), self.tensors, b"host state")
        self.mirror.settle()

    def close(self) -> None:
        self.mirror.close()
        self.arena.close()
        # It holds mappings, and pytest keeps a reference to this object.
        del self.mirror


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    made = Training(tmp_path)
    yield made
    made.close()


@contextmanager
def writer(training: Training, folder: Path, *, agent: int, limit_bytes: int | None = None) -> Iterator[Any]:
    """Run a writer with an interval of ten steps."""
    settings = WriterSettings(
        str(training.arena.path), str(folder), str(folder.parent / "ledger"), "run", agent, 10, None, 2
    )
    command = [sys.executable, "-m", MODULE, settings.to_text()]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    if limit_bytes is not None:
        # The process is still importing torch, so the limit applies before the first write.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_events(folder: Path, count: int, process: subprocess.Popen[str]) -> list[Event]:
    """Wait until the ledger has a number of events, and return them."""
    while process.poll() is None and len(read_ledger(folder / "ledger")) < count:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    return list(read_ledger(folder / "ledger"))


def test_states_are_written_when_due_and_at_the_end(training: Training, tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "durable")
    training.step_to(3)
    with writer(training, folder.path, agent=os.getpid()) as process:
        for count, step in enumerate((10, 25, 31), start=1):
            training.step_to(step)
            events = wait_for_events(tmp_path, count, process)
            assert events[-1].fields["step"] == step
        training.step_to(35)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    events = list(read_ledger(tmp_path / "ledger"))
    assert [(event.event, event.fields["step"]) for event in events] == [
        ("durable_written", step) for step in (10, 25, 31, 35)
    ]
    assert events[-1].fields["tries"] >= 1 and events[-1].fields["bytes"] > 120_000
    assert folder.versions() == (Version(31, True), Version(35, True))


def test_a_full_disk_is_one_warning_and_an_event_per_state(training: Training, tmp_path: Path) -> None:
    folder = tmp_path / "durable"
    with (
        subprocess.Popen(["sleep", "60"]) as agent,
        writer(training, folder, agent=agent.pid, limit_bytes=60_000) as process,
    ):
        for count, step in enumerate((10, 20), start=1):
            training.step_to(step)
            events = wait_for_events(tmp_path, count, process)
            assert [event.event for event in events] == ["durable_failed"] * count
        # The writer exits with its agent.
        agent.kill()
        _, output = process.communicate(timeout=120)
        assert process.returncode == 0
    assert output.count("writing the durable state of") == 1 and "training continues" in output
    assert DurableFolder(folder).states() == []
    assert [path.name for path in folder.iterdir()] == ["ckptless-durable.json"]
