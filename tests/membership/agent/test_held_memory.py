"""The agent holds memory for its workers until no link leads to it."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.membership.agent.held_memory import HeldMemory, request_memory
from lightning_ckptless.membership.channel.agent_channel import AgentChannel, FromWorker
from lightning_ckptless.membership.events import Event, MemoryHolderChosen
from lightning_ckptless.system.memory_files import is_memory_file


class Agent:
    """The agent's side, with one worker."""

    def __init__(self) -> None:
        self.channel, self.worker = AgentChannel.pair()
        self.events: list[Event] = []
        self.memory = HeldMemory("node0", self.events.append)

    def serve(self, *paths: Path) -> None:
        """Let the worker request files, and answer it."""
        with ThreadPoolExecutor(1) as pool:
            job: Future[None] = pool.submit(request_memory, self.worker, paths, "too small")
            while not job.done():
                select.select([self.channel], [], [], 0.005)
                self.memory.maintain([FromWorker(0, *received) for received in self.channel.poll()])
            job.result()

    def held(self) -> int:
        """How many files this process keeps open."""
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(link.startswith("/memfd:ckptless-") for link in links)


@pytest.fixture
def agent() -> Iterator[Agent]:
    found = Agent()
    yield found
    found.memory.close()
    found.channel.close()
    found.worker.close()


def test_requested_memory_is_held_and_announced_once(agent: Agent, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    agent.serve(*paths[:2])
    agent.serve(paths[2])
    assert all(is_memory_file(path) for path in paths)
    assert agent.events == [MemoryHolderChosen("node0", os.getpid(), "too small")]
    assert agent.events[0].sentence == "too small"
    agent.memory.close()
    assert agent.held() == 0 and not any(is_memory_file(path) for path in paths)


def test_memory_is_released_when_its_link_is_removed(agent: Agent, tmp_path: Path) -> None:
    agent.serve(tmp_path / "old", tmp_path / "kept")
    (tmp_path / "old").unlink()
    agent.serve(tmp_path / "new")
    assert agent.held() == 2
    agent.serve(tmp_path / "new")
    assert agent.held() == 2, "what is asked for again takes the place of what was there"


def test_memory_that_cannot_be_created_is_refused_with_the_reason(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match=r"the agent cannot hold 1 slots in anonymous memory: .*No such file"):
        agent.serve(tmp_path / "missing" / "slot")
    assert agent.held() == 0 and not agent.events


def test_a_worker_does_not_wait_for_an_agent_that_has_exited(agent: Agent, tmp_path: Path) -> None:
    agent.channel.close()
    with pytest.raises(ArenaError, match="it has exited"):
        request_memory(agent.worker, [tmp_path / "slot"], "too small")
