"""Requests to a live run: one agent takes each and answers it; those that another user may have written are ignored."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.membership.requests import (
    FOLDER_NAME,
    Answer,
    DrainRequest,
    Request,
    Requests,
    RewindRequest,
    TakenRequest,
    submit,
)

REQUESTS = [
    RewindRequest(to_step=12, skip_batches=3),
    RewindRequest(steps=5),
    DrainRequest(node=1),
    DrainRequest(rank=0),
]


class Clock:
    """A clock that only pauses move, on which something happens at every pause."""

    def __init__(self, happens: Callable[[], None] = lambda: None) -> None:
        self.now = 0.0
        self._happens = happens

    def __call__(self) -> float:
        return self.now

    def pause(self, duration_s: float) -> None:
        self.now += duration_s
        self._happens()


def ask(run: Path, request: Request, happens: Callable[[], None] = lambda: None) -> Answer:
    """Submit a request, with an agent that acts whenever the terminal pauses."""
    clock = Clock(happens)
    return submit(run, request, timeout_s=1.0, clock=clock, pause=clock.pause)


def files_of(run: Path) -> list[str]:
    return [path.name for path in (run / FOLDER_NAME).iterdir()]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_request_reaches_the_agent_and_its_answer_the_terminal(tmp_path: Path, request_: Request) -> None:
    agent, seen = Requests(tmp_path), []

    def act() -> None:
        for taken in agent.take():
            seen.append(taken.request)
            taken.answer(accepted=True, reason="resumed from step 12")

    answer = ask(tmp_path, request_, act)
    assert (seen, answer.accepted, answer.reason) == ([request_], True, "resumed from step 12")
    assert files_of(tmp_path) == []


def test_a_request_is_taken_by_the_agent_it_concerns(tmp_path: Path) -> None:
    other, ours, seen = Requests(tmp_path), Requests(tmp_path), []

    def act() -> None:
        assert other.take(lambda request: request == DrainRequest(node=0)) == []
        for taken in ours.take(lambda request: request == DrainRequest(node=1)):
            seen.append(taken)
            taken.answer(accepted=False, reason="it is the last node")

    answer = ask(tmp_path, DrainRequest(node=1), act)
    assert (len(seen), answer.accepted, answer.reason) == (1, False, "it is the last node")


def test_only_one_of_many_agents_takes_a_request(tmp_path: Path) -> None:
    agents, counts = [Requests(tmp_path) for _ in range(8)], []

    def act() -> None:
        with ThreadPoolExecutor(len(agents)) as threads:
            taken = [found for result in threads.map(lambda agent: agent.take(), agents) for found in result]
        counts.append(len(taken))
        for one in taken:
            one.answer(accepted=True, reason="")

    ask(tmp_path, RewindRequest(steps=1), act)
    assert sum(counts) == 1


def test_a_request_that_no_agent_takes_is_withdrawn(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no agent of .* has taken the request within 1 s, so it was withdrawn"):
        ask(tmp_path, DrainRequest(rank=0))
    assert files_of(tmp_path) == []
    assert Requests(tmp_path).take() == []


def test_a_request_that_is_taken_but_not_answered_says_so(tmp_path: Path) -> None:
    agent = Requests(tmp_path)
    taken: list[TakenRequest] = []
    with pytest.raises(LaunchError, match="has taken the request, but not answered within 1 s"):
        ask(tmp_path, DrainRequest(rank=0), lambda: taken.extend(agent.take()))
    assert [one.request for one in taken] == [DrainRequest(rank=0)]


def test_a_folder_that_others_may_write_to_is_refused_on_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / FOLDER_NAME
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OptionsError, match=r"not safe: .*mode 0777"):
        ask(tmp_path, DrainRequest(rank=0))
    (folder / "1.request").write_text("{}")
    agent = Requests(tmp_path)
    assert agent.take() == [] == agent.take()
    warning = f"{folder}: expected a folder that only user {folder.stat().st_uid} can write to, found mode 0777"
    assert caplog.text.count(f"ignoring requests to this run: {warning}") == 1


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-20], id="truncated"),
        pytest.param(lambda data: data.replace(b'"steps": 5', b'"steps": 6'), id="changed"),
        pytest.param(lambda data: b"\xff" * len(data), id="no_text"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_a_damaged_request_is_ignored(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    agent = Requests(tmp_path)

    def act() -> None:
        for path in (tmp_path / FOLDER_NAME).glob("*.request"):
            path.write_bytes(damage(path.read_bytes()))
        assert agent.take() == []

    with pytest.raises(LaunchError, match="withdrawn"):
        ask(tmp_path, RewindRequest(steps=5), act)
    assert "ignoring requests to this run" in caplog.text
