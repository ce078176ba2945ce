"""`ckptless watch` shows the right rank and cause of each kind of fault, from files alone, while the run is in trouble.

How soon is printed (`pytest -s`), not asserted: it depends on the load of the machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pytest

from lightning_ckptless import environment
from lightning_ckptless.cli.survey.reader import RunReader
from lightning_ckptless.cli.survey.survey import as_json, survey_of
from lightning_ckptless.ledger import LEDGER_NAME, read_ledger
from lightning_ckptless.testing.starters import Ladder
from tests.faults.cluster import Cluster
from tests.faults.conftest import REPOSITORY, Drill, command_for
from tests.faults.matrix import BASE, Cell
from tests.lab.parts import Options
from tests.mounts import small_memory

PATIENCE_S = 60.0
LOOK_EVERY_S = 0.05
ENDLESS = Options(epochs=100_000, logger="none")


def look(folder: Path) -> dict[str, Any]:
    """Read a run as `ckptless watch --once --json` does."""
    found: dict[str, Any] = json.loads(as_json(survey_of(RunReader(folder).read())))
    return found


@dataclass
class Watcher:
    """Looks at the new runs in a folder from a thread of its own, and keeps when each alarm and fault was first shown.

    Args:
        root: folder with the folders of runs; those that exist already are left out.
    """

    root: Path
    shown: dict[tuple[str, int | None, str], float] = field(default_factory=dict)
    _before: frozenset[Path] = frozenset()
    _over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Look until `stop` is called."""
        while not self._over.wait(LOOK_EVERY_S):
            for ledger in self._ledgers() - self._before:
                found = look(ledger.parent)
                for shown in (*found["alarms"], *found["faults"]):
                    self.shown.setdefault((shown["kind"], shown["rank"], shown["text"]), found["at"])

    def _ledgers(self) -> frozenset[Path]:
        return frozenset(self.root.rglob(LEDGER_NAME))

    def __enter__(self) -> Self:
        self._before = self._ledgers()
        self._thread = threading.Thread(target=self.look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait_for(self, kind: str) -> None:
        """Wait until an alarm or a fault of a kind is shown."""
        deadline = time.monotonic() + PATIENCE_S
        while all(shown != kind for shown, *_ in list(self.shown)) and time.monotonic() < deadline:
            self._over.wait(LOOK_EVERY_S)

    def first(self, kinds: str, rank: int | None, words: str, since: float) -> float | None:
        """Return after how many seconds one of some kinds was shown for a rank, with words that match a pattern."""
        delays = [
            at - since
            for (kind, of, text), at in self.shown.items()
            if kind in kinds.split("|") and of == rank and at >= since and re.search(words, text)
        ]
        return min(delays, default=None)


INJECTED = {
    "kill:rank=0:step=3": ("killed|gone", 0, "SIGKILL"),
    "raise:rank=1:step=7": ("raised", 1, "InjectedError: injected at step 7"),
    "hang:rank=0:step=11": ("behind|hung", 0, "of step 11"),
    "exit:rank=1:step=15": ("exited|gone", 1, "exited with code 3"),
    "leave:rank=0:step=19": ("exited|gone", 0, "exited with code 0|has left"),
    "stop:rank=1:step=23": ("stopped|hung", 1, "a signal has stopped rank 1"),
    "crash:rank=0:step=27": ("killed|gone", 0, "SIGSEGV"),
}
"""Faults, and the kinds of alarms or faults that are to show them, with the rank and words of their text."""


@pytest.mark.long
def test_injected_faults_are_shown(drill: Drill, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = replace(BASE, epochs=6, strategy_options="{'hang_timeout_s': 1.5, 'failure_domain': 'rank'}")
    with Watcher(tmp_path_factory.getbasetemp()) as watcher:
        report = drill(Cell(",".join(INJECTED), options), Ladder(max_restarts=20))
    assert report.problems == ()
    assert report.identical
    assert report.in_place == len(INJECTED)
    at = {event.fields["fault"]: event.at for event in report.faulted.events if event.event == "fault_injected"}
    delays = {fault: watcher.first(*expected, since=at[fault]) for fault, expected in INJECTED.items()}
    for fault, delay_s in delays.items():
        print(f"{fault:<24} shown after {delay_s} s")
    assert [fault for fault, delay_s in delays.items() if delay_s is None] == []


@dataclass
class Live:
    """A run in a process of its own, which trains until it is ended.

    Args:
        folder: receives its output.
        root: folder of its run folder.
        agent: its agent.
    """

    folder: Path
    root: Path
    agent: subprocess.Popen[bytes]

    def see(self, good: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Look until something is shown, and return the status that shows it."""
        pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
        found: dict[str, Any] = {}
        while time.monotonic() < deadline:
            for ledger in self.root.glob(f"*/{LEDGER_NAME}"):
                found = look(ledger.parent)
                if good(found):
                    return found
            pause.wait(LOOK_EVERY_S)
        output = (self.folder / "output.log").read_text()[-2000:]
        pytest.fail(f"{what} is not shown: {json.dumps(found.get('alarms'), indent=1)}\n{output}")

    def trains(self) -> dict[str, Any]:
        """Wait until the run trains without any alarm, with its standby ready, and has all its copies."""
        return self.see(
            lambda found: (
                not found["alarms"]
                and found["standbys"] == {"ready": 1, "wanted": 1}
                and len(found["members"]) == 2
                and all(member["step"] and member["step"] > 2 for member in found["members"])
                and found["protected"]["losses"] == 1
            ),
            "training without alarms",
        )

    def sees_alarm(self, kind: str, rank: int | None, words: str) -> float:
        """Wait until an alarm or a fault is shown; returns after how many seconds it was."""
        began_at = time.time()

        def shows(found: dict[str, Any]) -> bool:
            shown = [*found["alarms"], *(fault for fault in found["faults"] if fault["at"] > began_at - 0.5)]
            return any(one["kind"] == kind and one["rank"] == rank and words in one["text"] for one in shown)

        delay_s: float = self.see(shows, f"{kind} of rank {rank}")["at"] - began_at
        print(f"{kind:<24} shown after {delay_s:.2f} s")
        return delay_s


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A run of two ranks with a standby, durable states and a small file system for its ledger."""
    with ExitStack() as stack:
        root = stack.enter_context(small_memory(tmp_path / "runs", 4))
        strategy = {"failure_domain": "rank", "standbys": 1, "durable_every_n_steps": 20}
        command = command_for(replace(ENDLESS, strategy_options=repr(strategy), root=str(tmp_path)))
        log = stack.enter_context((tmp_path / "output.log").open("wb"))
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), environment.RUN_ROOT: str(root), "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-m", "lightning_ckptless.runner", "--nproc-per-node", "2", "--rdzv-id", "live"]
        env[environment.ARENA_DIR] = str(tmp_path / "arenas")
        agent = subprocess.Popen([*run, *command], cwd=tmp_path, env=env, stdout=log, stderr=log)
        try:
            yield Live(tmp_path, root, agent)
        finally:
            if agent.poll() is None:
                agent.terminate()
            agent.wait(60)


@pytest.mark.long
def test_faults_from_outside_are_shown(live: Live) -> None:
    found = live.trains()
    assert found["pace"]["of"] == 6 * ENDLESS.epochs
    pids = {member["rank"]: member["pid"] for member in found["members"]}
    os.kill(pids[0], signal.SIGSTOP)
    live.sees_alarm("stopped", 0, "a signal has stopped rank 0")
    os.kill(pids[0], signal.SIGCONT)
    live.trains()

    os.kill(pids[1], signal.SIGKILL)
    live.sees_alarm("killed", 1, "rank 1 died by SIGKILL")
    live.trains()
    (recovery,) = look(live.root / "live")["recoveries"]
    assert (recovery["culprit_rank"], recovery["cause"]) == (1, "died by SIGKILL")

    os.kill(_standby_of(live), signal.SIGKILL)
    live.sees_alarm("standbys", None, "0 of 1 standbys")
    live.trains()

    filler = live.root / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    live.sees_alarm("disk_full", None, "the disk is full")
    live.sees_alarm("ledger_stale", None, "the ledger has recorded no version")
    filler.unlink()
    live.sees_alarm("durable_failed", None, "could not be written")

    for path in (live.folder / "arenas").glob("*/*.held-by-0001.*"):
        path.unlink()
    live.sees_alarm("uncovered", None, "rank0 holds the only copy of a shard")

    live.agent.kill()
    live.sees_alarm("agent_exited", None, f"(pid {live.agent.pid}) has exited")
    assert look(live.root / "live")["state"] == "stopped"


def _standby_of(live: Live) -> int:
    events = read_ledger(live.root / "live" / LEDGER_NAME, only="standbys").events
    return int(events[-1].fields["pids"][0])


@pytest.mark.long
def test_a_lost_node_is_shown(tmp_path: Path) -> None:
    options = replace(BASE, devices=1, num_nodes=2)
    with ExitStack() as stack, Watcher(tmp_path / "runs") as watcher:
        (tmp_path / "runs").mkdir()
        cluster = Cluster(tmp_path, stack, options, external_store=False)
        cluster.start_agent()
        lost = cluster.start_agent("node:rank=1:step=6", "127.0.0.2")
        lost.wait(timeout=PATIENCE_S)
        at = time.time()
        cluster.remove_arena(lost)
        # A node that joins before the other one has been silent for long enough takes its place without a word.
        watcher.wait_for("node_lost")
        replacement = cluster.start_agent("", "127.0.0.2")
        assert replacement.wait(timeout=90) == 0, cluster.output()
    shown = {"agent_exited": rf"\(pid {lost.pid}\) has exited", "node_lost": "silent"}
    delays = {kind: watcher.first(kind, None, words, since=at - 5) for kind, words in shown.items()}
    for kind, delay_s in delays.items():
        print(f"{kind:<24} shown {delay_s if delay_s is None else delay_s - 5} s after the exit of the agent")
    assert [kind for kind, delay_s in delays.items() if delay_s is None] == []


@pytest.mark.long
def test_a_straggler_is_shown(drill: Drill, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = replace(BASE, callback="dragging")
    with Watcher(tmp_path_factory.getbasetemp()) as watcher:
        report = drill(Cell("kill:rank=1:step=11", options), Ladder(max_restarts=3))
    assert report.problems == ()
    # Other tests with this callback leave such files too.
    since = max(note.stat().st_mtime for note in tmp_path_factory.getbasetemp().rglob("first_of_rank_1"))
    delay_s = watcher.first("straggler", 1, "x the median of the others", since=since)
    print(f"straggler                shown after {delay_s} s")
    assert delay_s is not None
