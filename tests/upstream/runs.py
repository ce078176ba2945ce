"""Runs each test file in its own process, forked from a process that has imported the common dependencies.

If a test ends its process, or cannot be stopped by a timeout within the process, this is recorded as its outcome, and
the remaining tests are run in a new process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.upstream.sources import Sources

StrategyName = Literal["ddp", "ckptless"]
STRATEGIES: tuple[StrategyName, ...] = ("ddp", "ckptless")
TEST_TIMEOUT_S = 60
FILE_TIMEOUT_S = 1200
ALL = "all"
# Modules that many tests import, and the plugin.
PRELOADED = (
    "lightning_ckptless.lightning_pytorch",
    "omegaconf",
    "tests.upstream.plugin",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one test.

    Args:
        result: `passed`, `failed`, `skipped`, or `died` if its process ended with it.
        message: error message.
        place: file and line of the error.
        trainers: number of trainers that were created with the forced strategy.
        seconds: duration.
    """

    result: str
    message: str = ""
    place: str = ""
    trainers: int = 0
    seconds: float = 0.0


Outcomes = dict[str, Outcome]


class Runner:
    """Runs test files with one strategy and keeps the outcomes in a folder.

    Args:
        sources: sources of the tests.
        strategy: strategy to train with.
        folder: receives a record `*.jsonl` and the output `*.txt` per test file.
    """

    def __init__(self, sources: Sources, strategy: StrategyName, folder: Path) -> None:
        self._sources = sources
        self.strategy: StrategyName = strategy
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)

    def run(self, file: str, only: Sequence[str] = (), *, trial: str = "") -> Outcomes:
        """Run the tests of a file, or return their outcomes if they have been run before.

        Args:
            file: path relative to the folder of the tests.
            only: ids of the tests to run; empty for all.
            trial: distinguishes several runs of the same file.
        """
        record, finished, output = (self._path(file, trial, kind) for kind in ("jsonl", "finished", "txt"))
        wanted = "\n".join(only) or ALL
        if finished.exists() and finished.read_text() in {wanted, ALL}:
            outcomes = read_record(record)
            return {test: outcomes[test] for test in only or outcomes if test in outcomes}
        for path in (record, finished, output):
            path.unlink(missing_ok=True)
        while True:
            done = read_record(record)
            status = self._run_once(file, trial, only, done)
            dead = _unfinished(record)
            if dead is None:
                break
            _record_death(record, dead, status)
        finished.write_text(wanted)
        return read_record(record)

    def forget(self, file: str) -> None:
        """Discard the outcomes of a file, so that it is run again."""
        for path in self._folder.glob(f"{_name(file)}.*finished"):
            path.unlink()

    def _run_once(self, file: str, trial: str, only: Sequence[str], done: Iterable[str]) -> str:
        """Run the remaining tests in a new process; return how the process ended."""
        record, excluded, included = (self._path(file, trial, kind) for kind in ("jsonl", "except", "only"))
        excluded.write_text("\n".join(done))
        arguments = [file, f"--record={record}", f"--except={excluded}"]
        if only:
            included.write_text("\n".join(only))
            arguments.append(f"--only={included}")
        for module in PRELOADED:
            import_module(module)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            os._exit(self._in_child(self._path(file, trial, "txt"), arguments))
        return _wait(child)

    def _in_child(self, output: Path, arguments: Sequence[str]) -> int:
        # Loading other installed plugins takes seconds per file.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        sys.pycache_prefix = str(self._folder.parent / "bytecode")
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(printed, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(self._sources.tests)
        code = pytest.main(
            [
                "-ppytest_timeout",
                f"-c{self._sources.root / 'pyproject.toml'}",
                f"--rootdir={self._sources.tests}",
                "-ptests.upstream.plugin",
                "-pno:cacheprovider",
                f"--timeout={TEST_TIMEOUT_S}",
                "--timeout-method=signal",
                "-q",
                "--tb=short",
                "--color=no",
                f"--forced-strategy={self.strategy}",
                *arguments,
            ]
        )
        sys.stdout.flush()
        sys.stderr.flush()
        return int(code)

    def _path(self, file: str, trial: str, kind: str) -> Path:
        return self._folder / f"{_name(file)}.{trial}{kind}"


def _name(file: str) -> str:
    return file.removesuffix(".py").replace("/", "-")


def read_record(record: Path) -> Outcomes:
    """Return the outcomes of the tests that have ended, by test id."""
    return {line.pop("ended"): Outcome(**line) for line in _lines(record) if "ended" in line}


def _lines(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def _unfinished(record: Path) -> str | None:
    """Return the test that has started and not ended."""
    ended = read_record(record)
    return next((str(line["began"]) for line in _lines(record) if line.get("began", "") not in {"", *ended}), None)


def _record_death(record: Path, test: str, status: str) -> None:
    line = {"ended": test, "result": "died", "message": f"its process {status}", "trainers": 1}
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _wait(child: int) -> str:
    """Wait for a process, kill its process group at its end or at the timeout, and return how it ended."""
    is_late, descriptor = False, os.pidfd_open(child)
    try:
        is_late = not select.select([descriptor], [], [], FILE_TIMEOUT_S)[0]
    finally:
        os.close(descriptor)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if is_late:
        return f"took longer than {FILE_TIMEOUT_S} s for the file"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
