"""Votes in shared memory: among real processes, some of which die in a vote; aborted, and late."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_ckptless.errors import ArenaError, TransportError
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.ballot_box import BallotBox
from lightning_ckptless.replica.node_memory import NodeMemory, make_memory
from lightning_ckptless.system import futex

# A rank of a node, which does what the test requests.
RANK = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from lightning_ckptless.errors import TransportError
    from lightning_ckptless.replica.ballot_box import BallotBox
    from lightning_ckptless.replica.node_memory import NodeMemory
    from lightning_ckptless.system import futex

    path, ranks, rank, what = sys.argv[1], range(int(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
    box = BallotBox(NodeMemory(Path(path), len(ranks)), ranks, rank, is_led=False, timeout_s=60.0)

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        outcomes = [box.collect(7)]
        if what == "rounds":
            own, everyone = random.Random(f"delays of {rank}"), random.Random("votes")
            for _ in range(1000):
                votes = [everyone.getrandbits(48) | everyone.getrandbits(48) for _ in ranks]
                payloads = [everyone.randbytes(everyone.choice((0, 20, 30_000))) for _ in ranks]
                if own.random() < 0.1:
                    time.sleep(own.random() * 0.002)
                expected = (1 << 48) - 1
                for vote in votes:
                    expected &= vote
                assert box.collect(votes[rank]) == expected
                assert box.gather(payloads[rank]) == payloads
        elif what == "before":
            box._store = die
        elif what == "after storing":
            futex.wake = die
        elif what == "after voting":
            futex.wait = die
        elif what == "last":
            sys.stdin.readline()
        for vote in (6, 5):
            outcomes.append(box.collect(vote))
    except TransportError as error:
        outcomes.append(str(error))
    print(json.dumps(outcomes), flush=True)
"""

StartNode = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts one process per role, as the ranks of a node."""
    with ExitStack() as stack:

        def start(*roles: str) -> list[subprocess.Popen[str]]:
            path = make_memory(tmp_path, len(roles))
            env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-c", textwrap.dedent(RANK), str(path), str(len(roles))]
            ranks = [
                stack.enter_context(
                    subprocess.Popen(
                        [*command, str(rank), role], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    )
                )
                for rank, role in enumerate(roles)
            ]
            for rank in ranks:
                stack.callback(rank.kill)
            return ranks

        yield start


def tell(rank: subprocess.Popen[str], line: str) -> None:
    assert rank.stdin is not None
    rank.stdin.write(f"{line}\n")
    rank.stdin.flush()


def said(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline()


def test_vote_of_four_processes_with_random_delays(start_node: StartNode) -> None:
    for rank in start_node(*["rounds"] * 4):
        assert json.loads(said(rank)) == [7, 6, 5]
        assert rank.wait(30) == 0


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["before", "after storing", "after voting"])
def test_vote(start_node: StartNode, moment: str, victim: int) -> None:
    """What a rank has voted counts, and its death ends the wait of the others without anyone telling them."""
    others = ["last", "waits"]
    ranks = start_node(*others[:victim], moment, *others[victim:])
    assert ranks[victim].wait(30) == -signal.SIGKILL
    survivors = {rank: process for rank, process in enumerate(ranks) if rank != victim}
    # The third rank votes only when the victim is dead, and the round may still be complete.
    tell(survivors[min(survivors)], "the victim is dead")
    lost = f"vote with peers failed: rank {victim} (process {ranks[victim].pid}) has exited"
    voted = [7] if moment == "before" else [7, 6]
    for rank, process in survivors.items():
        assert json.loads(said(process)) == [*voted, f"rank {rank}: {lost}"]
        assert process.wait(30) == 0


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[list[BallotBox]]:
    """The ballot boxes of two ranks in this process, which wait 60 s and 0.3 s for each other."""
    path = make_memory(tmp_path, 2)
    made = [
        BallotBox(NodeMemory(path, 2), (0, 1), rank, is_led=False, timeout_s=timeout_s)
        for rank, timeout_s in ((0, 60), (1, 0.3))
    ]
    yield made
    for box in made:
        box.close()


def test_a_vote_is_aborted_while_it_waits(boxes: list[BallotBox], monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps, errors = threading.Event(), list[str]()
    wait = futex.wait

    def note_and_wait(address: int, seen: int, timeout_s: float) -> None:
        sleeps.set()
        wait(address, seen, 60.0)

    def vote() -> None:
        with pytest.raises(TransportError) as raised:
            boxes[0].collect(1)
        errors.append(str(raised.value))

    monkeypatch.setattr(futex, "wait", note_and_wait)
    thread = threading.Thread(target=vote)
    thread.start()
    assert sleeps.wait(30)
    while thread.is_alive():
        # As the watcher does: the first call may come between the last look and the sleep.
        boxes[0].abort()
        thread.join(0.01)
    why = "rank 0: vote with peers failed: this rank was notified of a regroup, or an earlier vote failed"
    assert errors == [why]
    with pytest.raises(TransportError, match="an earlier vote failed"):
        boxes[0].collect(1)


def test_a_silent_rank_is_an_error(boxes: list[BallotBox]) -> None:
    with pytest.raises(TransportError, match=r"rank 1: .*: no vote of rank 0 of this node within 0\.3 s"):
        boxes[1].collect(1)
    # Rank 0 may have counted the vote: this rank must not continue as if it had not been cast.
    with pytest.raises(TransportError, match="an earlier vote failed"):
        boxes[1].collect(1)


def test_a_machine_without_the_call_polls(boxes: list[BallotBox], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "_NUMBER", None)
    outcomes = list[int]()
    thread = threading.Thread(target=lambda: outcomes.append(boxes[0].collect(6)))
    thread.start()
    outcomes.append(boxes[1].collect(3))
    thread.join()
    assert outcomes == [2, 2]


def test_memory_is_private_and_removed_with_the_arena(arena: Arena) -> None:
    path = make_memory(arena.path, 3)
    assert (path.stat().st_mode & 0o777, path.stat().st_blocks > 0) == (0o600, True)
    NodeMemory(path, 3).close()
    assert arena.inventory() == ()
    arena.remove()
    assert not path.exists()


def test_memory_needs_room(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="cannot create the memory for votes"):
        make_memory(tmp_path / "missing", 3)


def test_a_payload_without_room_ends_the_votes(boxes: list[BallotBox], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(ArenaError, match="cannot write 5 bytes into the memory that the ranks of this node share"):
        boxes[0].gather(b"large")
    with pytest.raises(TransportError, match="an earlier vote failed"):
        boxes[0].collect(1)


def test_a_payload_is_read_again_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, reads = NodeMemory(make_memory(tmp_path, 1), 1), list[int]()
    memory.write(0, 1, b"earlier")
    read = os.pread

    def write_late(file: int, count: int, at: int) -> bytes:
        reads.append(at)
        if len(reads) == 3:
            memory.write(0, 3, bytes(50_000))
        return read(file, count, at)

    monkeypatch.setattr(os, "pread", write_late)
    assert memory.read(0, 3) == bytes(50_000)
    assert len(reads) == 4
    with pytest.raises(ArenaError, match="is damaged in line 0, round 5"):
        memory.read(0, 5)
    memory.close()


def test_a_process_is_unknown_until_it_has_introduced_itself(tmp_path: Path) -> None:
    memory, process = NodeMemory(make_memory(tmp_path, 2), 2), Owner.of(os.getpid())
    memory.introduce(1, process)
    assert (memory.process(0), memory.process(1)) == (None, process)
    memory.close()
