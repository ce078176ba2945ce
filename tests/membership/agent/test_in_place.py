"""The agent's part in recoveries in place, with scripted workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_ckptless.console import Bar
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping, Regroupings
from lightning_ckptless.protocol.hang_detection import RELEASE_S
from lightning_ckptless.protocol.messages import EnteredLoop, Message, Regroup, ReleasedGroups
from tests.membership.conftest import script

ENTERED = EnteredLoop(
    in_place=True,
    standbys=0,
    preload_imports=False,
    hang_timeout_s=None,
    max_recoveries_without_progress=9,
    max_recoveries_per_hour=9,
    bar=Bar.NONE,
    obstacle=None,
    fixed_world="",
    straggler_factor=1.5,
    drain_stragglers_after_s=None,
)

# Rank 0 kills itself once all ranks have entered the loop; the others answer the agent's messages.
WORKER = """
    import json, os, signal, sys, time
    from pathlib import Path
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.protocol.messages import EnteredLoop, LeftLoop, ReleasedGroups, StuckCollective

    rank, channel, last = os.environ["RANK"], open_channel(), int(sys.argv[1])
    options = {"standbys": 0, "preload_imports": False, "hang_timeout_s": None, "obstacle": None, "fixed_world": ""}
    options |= {"straggler_factor": 1.5, "drain_stragglers_after_s": None}
    options |= {"max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    channel.send(EnteredLoop(in_place=True, **options))
    number = int(os.environ.get("CKPTLESS_REGROUPING", "0"))
    Path(f"came-{rank}-{number}").touch()
    if rank == "0" and not number:
        while not all(Path(f"came-{other}-0").exists() for other in (0, 1, 2)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    while number < last:
        number = channel.receive().message.number
        if rank == "1" and number in (1, 3):
            channel.send(StuckCollective("it sleeps", [f"1 python: state S, at {number}"], []))
        if rank != "1" or number != 1:
            channel.send(ReleasedGroups())
        if rank == "2" and number == 2 and last == 3:
            while not Path("came-1-2").exists():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
    channel.send(LeftLoop())
"""


@pytest.mark.timeout(25)
def test_a_rank_with_a_stuck_collective_is_replaced_at_once(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    config = LaunchConfig(program=script(write(WORKER), "2"), nproc=3, cwd=tmp_path, max_restarts=3)
    outcome = run(config, parent=bare, record=lambda event, **fields: events.append((event, fields)))
    assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 0, 2)
    assert [(fault.rank, fault.hung) for fault in outcome.faults] == [
        (0, ""),
        (1, "did not release its process groups after the fault: it sleeps"),
    ]
    hangs = [fields for event, fields in events if event == "hang"]
    assert [fields["local_ranks"] for fields in hangs] == [[1]], json.dumps(hangs)
    said = [fields for event, fields in events if event == "stuck_collective"]
    expected = {"reason": "it sleeps", "threads": ["1 python: state S, at 1"], "sockets": [], "believed": True}
    assert said == [{"local_rank": 1, **expected}]


@pytest.mark.timeout(25)
def test_a_second_report_before_a_committed_step_does_not_replace_the_rank_again(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    config = LaunchConfig(program=script(write(WORKER), "3"), nproc=3, cwd=tmp_path, max_restarts=4)
    outcome = run(config, parent=bare, record=lambda event, **fields: events.append((event, fields)))
    assert [fault.rank for fault in outcome.faults] == [0, 1, 2]
    assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 0, 3)
    said = [fields["believed"] for event, fields in events if event == "stuck_collective"]
    assert said == [True, False]


# Rank 0 kills itself; after that rank 1 creates the first process group only, until it has been replaced.
WITHOUT_GROUP = """
    import os, signal, time
    from pathlib import Path
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.protocol.messages import CreatedGroup, EnteredLoop, LeftLoop
    from lightning_ckptless.protocol.messages import Regroup, Regrouped, ReleasedGroups

    rank, channel = os.environ["RANK"], open_channel()
    options = {"standbys": 0, "preload_imports": False, "hang_timeout_s": 1.0, "obstacle": None, "fixed_world": ""}
    options |= {"straggler_factor": 1.5, "drain_stragglers_after_s": None}
    options |= {"max_recoveries_without_progress": 9, "max_recoveries_per_hour": 9, "bar": "none"}
    channel.send(EnteredLoop(in_place=True, **options))
    number = int(os.environ.get("CKPTLESS_REGROUPING", "0"))
    Path(f"came-{rank}-{number}").touch()
    if rank == "0" and not number:
        while not all(Path(f"came-{other}-0").exists() for other in (0, 1, 2)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        if number:
            channel.send(ReleasedGroups())
            channel.send(CreatedGroup(number, 1))
            if rank != "1" or number == 2:
                channel.send(CreatedGroup(number, 2))
            if number == 2:
                break
        while not isinstance(message := channel.receive().message, Regroup):
            pass
        number = message.number
    channel.send(Regrouped(number))
    channel.send(LeftLoop())
"""


# Rank 0 kills itself; its first replacement reaches the training loop and then does nothing.
SILENT_REPLACEMENT = WITHOUT_GROUP.replace(
    """    while True:
        if number:
""",
    """    while True:
        if rank == "0" and number == 1:
            time.sleep(60)
        if number:
""",
)


@pytest.mark.timeout(25)
@pytest.mark.parametrize(
    ("worker", "rank", "reason"),
    [
        (SILENT_REPLACEMENT, 0, "did not release its process groups within 1.0 s of the fault report"),
        (WITHOUT_GROUP, 1, "did not create a process group within 1.0 s of the other ranks"),
    ],
    ids=["replacement=silent_in_the_loop", "survivor=without_group"],
)
def test_a_rank_that_holds_up_a_regroup_is_replaced(
    worker: str, rank: int, reason: str, bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = LaunchConfig(program=script(write(worker)), nproc=3, cwd=tmp_path, max_restarts=3)
    outcome = run(config, parent=bare)
    assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 0, 2)
    assert [(fault.rank, fault.hung) for fault in outcome.faults] == [(0, ""), (rank, reason)]


class Workers:
    """Two local ranks that note what they are sent.

    Args:
        inside: those that are in the training loop.
    """

    running_ranks = (0, 1)

    def __init__(self, inside: Collection[int] = running_ranks) -> None:
        self.inside = inside
        self.sent: list[tuple[int, int]] = []

    def send_to(self, rank: int, message: Message) -> None:
        assert isinstance(message, Regroup)
        self.sent.append((rank, message.number))

    def replace(self, rank: int, env: Mapping[str, str]) -> None:
        raise NotImplementedError

    def promote(self, rank: int, standby: Process, env: Mapping[str, str], regrouping: Regrouping) -> None:
        raise NotImplementedError


FAULT = FaultReport(None, None, None, None, 1.0, 1.0, 1.0, 1, 4)


def in_place_at(now: Callable[[], float]) -> InPlaceRecovery:
    return InPlaceRecovery(
        in_place=None,
        standbys=None,
        preload_imports=None,
        folder=Path(),
        outputs=Path(),
        report=print,
        clock=Clock(now, now),
    )


def test_a_regroup_with_joining_nodes_does_not_replace_that_of_a_later_fault() -> None:
    in_place, workers, store = in_place_at(lambda: 0.0), Workers(), HashStore()
    in_place.begin_round(Regroupings(store, 2, 5), lambda _: pytest.fail("no standby"), env_of=lambda _: {})
    Regroupings(store, 2, 5).open(FAULT)
    in_place.follow(workers)
    in_place.regroup(workers, 5, FAULT)
    assert workers.sent == [(0, 6), (1, 6)]
    assert in_place.number == 6


def test_a_worker_notified_before_it_has_reached_fit_is_watched_from_there_on() -> None:
    now = 100.0
    in_place, workers, store = in_place_at(lambda: now), Workers(inside={0}), HashStore()
    in_place.begin_round(Regroupings(store, 2, 5), lambda _: pytest.fail("no standby"))
    Regroupings(store, 2, 5).open(FAULT)
    in_place.follow(workers)
    assert in_place.regroup_status(workers).unreleased == {0: 100.0}
    in_place.receive([FromWorker(0, ReleasedGroups(), [])])
    now += 10 * RELEASE_S
    assert in_place.poll() is None, "it may still import"
    in_place.receive([FromWorker(1, ENTERED, [])])
    now += RELEASE_S - 1.0
    assert in_place.poll() is None
    now += 2.0
    found = in_place.poll()
    assert found is not None and found.ranks == (1,)
