"""`ckptless watch` finds the run, shows it in a terminal, and prints it for scripts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME, Ledger
from lightning_ckptless.replica.arena import Arena, Owner
from tests.cli.ledgers import BEGAN_AT, RUN_ID, time_spent, write_ledger
from tests.cli.test_status import DEAD, fill
from tests.house.code import REPOSITORY
from tests.outsider import UID, needs_another_user

WATCHES = "from lightning_ckptless.cli.app import main; main()"


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """The arena of a run whose agent is this process."""
    made = Arena.create(tmp_path / "shm", RUN_ID, "node-a", Owner.of(os.getpid()))
    for rank in (0, 1):
        fill(made, shard=rank, holder=rank, committed=6, staged=7)
    yield made
    made.close()


@pytest.fixture
def root(tmp_path: Path, arena: Arena) -> Path:
    """The folder of all runs, with a run that trains."""
    write_ledger(tmp_path / "runs", arena=arena.path, ended=False)
    return tmp_path / "runs"


def run(*words: str, command: str = "watch") -> str:
    result = CliRunner().invoke(app, [command, *words], env={"COLUMNS": "160"})
    if isinstance(result.exception, OptionsError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def facts(text: str) -> Any:
    """The JSON of a run, without what depends on when it was read."""
    return {name: value for name, value in json.loads(text).items() if name not in ("at", "commit_age_s", "tiers")}


def test_once_shows_the_run(root: Path) -> None:
    text = run("--run-root", str(root), "--once")
    for words in (RUN_ID, "running", "nothing is protected yet", "step 6", "1 of 2 ready", "rank 1 died by SIGKILL"):
        assert words in text


def test_json_is_that_of_status(root: Path) -> None:
    words = (RUN_ID, "--run-root", str(root))
    assert facts(run(*words, "--once", "--json")) == facts(run(*words, "--json", command="status"))
    with pytest.raises(OptionsError, match="--json prints a run once: add --once"):
        run(*words, "--json")


def test_the_arenas_may_be_in_another_folder(root: Path, tmp_path: Path) -> None:
    elsewhere = json.loads(run(RUN_ID, "--run-root", str(root), "--arena-dir", str(tmp_path), "--once", "--json"))
    assert (elsewhere["arenas"], elsewhere["state"]) == ([], "silent")


def test_without_a_terminal(root: Path) -> None:
    with pytest.raises(OptionsError, match="the output is not a terminal: add --once"):
        run("--run-root", str(root))


def test_the_only_live_run_is_found(root: Path) -> None:
    Ledger(root / "over" / LEDGER_NAME).record("run_started", generation=1, arena="/nonexistent/x")
    assert json.loads(run("--run-root", str(root), "--once", "--json"))["run_id"] == RUN_ID


def test_several_live_runs_are_listed(root: Path, arena: Arena) -> None:
    other = Arena.create(arena.path.parent, "other", "node-a", Owner.of(os.getpid()))
    Ledger(root / "other" / LEDGER_NAME).record("run_started", generation=1, arena=str(other.path))
    with pytest.raises(OptionsError, match=rf"2 runs are live: other, {RUN_ID}: name one, as in `ckptless watch RUN`"):
        run("--run-root", str(root), "--once")


def test_without_a_live_run(tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs")
    with pytest.raises(OptionsError, match=f"no run is live; the newest runs: {RUN_ID}: name one"):
        run("--run-root", str(tmp_path / "runs"))
    with pytest.raises(OptionsError, match="the newest run: no ledger"):
        run("--run-root", str(tmp_path / "none"))


def test_a_run_that_is_over_shows_its_end(tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs")
    text = run(RUN_ID, "--run-root", str(tmp_path / "runs"))
    assert "ended" in text and "goodput    75.0%" in text


def test_a_run_without_its_agent_is_shown_once(root: Path, arena: Arena) -> None:
    arena.remove()
    Arena.create(arena.path.parent, RUN_ID, "node-a", DEAD).close()
    assert "stopped" in run(RUN_ID, "--run-root", str(root))


@needs_another_user
def test_the_run_of_another_user(root: Path) -> None:
    os.chown(root / RUN_ID / LEDGER_NAME, UID, UID)
    with pytest.raises(OptionsError, match=f"belongs to user {UID}, and you are user 0: only its own user can read"):
        run(RUN_ID, "--run-root", str(root))
    with pytest.raises(OptionsError, match="no run is live"):
        run("--run-root", str(root))


class Terminal:
    """A pseudo-terminal in which the run is watched.

    Args:
        root: folder of all runs.
    """

    def __init__(self, root: Path) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (30, 110))
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        command = [sys.executable, "-c", WATCHES, "watch", "--run-root", str(root)]
        self.process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._written = bytearray()
        self._news = threading.Condition()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        with suppress(OSError):
            while chunk := os.read(self._ours, 65536):
                with self._news:
                    self._written += chunk
                    self._news.notify()

    @property
    def text(self) -> str:
        return self._written.decode(errors="replace")

    def shows(self, words: str) -> bool:
        """Wait until words are shown."""
        with self._news:
            return self._news.wait_for(lambda: words in self.text, timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reading.join()
        os.close(self._ours)


@pytest.fixture
def terminal(root: Path) -> Iterator[Terminal]:
    made = Terminal(root)
    yield made
    made.close()


@pytest.mark.slow
def test_a_live_view_that_is_left_with_ctrl_c(terminal: Terminal, root: Path) -> None:
    assert terminal.shows("step 6"), terminal.text
    Ledger(root / RUN_ID / LEDGER_NAME).record("committed", step=41, of=50)
    assert terminal.shows("step 41 of 50"), terminal.text
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 0
    # The last state stays on the ordinary screen.
    assert terminal.shows("\x1b[?1049l")
    after = terminal.text.rpartition("\x1b[?1049l")[2]
    assert "step 41 of 50" in after and "Traceback" not in terminal.text


@pytest.mark.long
def test_a_live_view_ends_with_the_run(terminal: Terminal, root: Path, arena: Arena) -> None:
    assert terminal.shows("step 6"), terminal.text
    ledger = Ledger(root / RUN_ID / LEDGER_NAME, clock=lambda: BEGAN_AT + 16.0)
    ledger.record("time_spent", rank=0, **time_spent(16.0, is_over=True, start=2.0, training=14.0))
    ledger.record("run_ended", goodput=0.875, recoveries=2)
    arena.remove()
    assert terminal.process.wait(60) == 0
    assert terminal.shows("87.5%"), terminal.text
