"""For every test: it leaves nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import resource_tracker

import pytest
from hypothesis import HealthCheck, settings
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless import environment
from tests import police


def pytest_addoption(parser: pytest.Parser) -> None:
    """One flag, for one seed of the simulations."""
    parser.addoption("--simulation-seed", type=int, help="run the simulations of recovery with this seed alone")


# How long an example takes says nothing on a busy machine.
settings.register_profile("no_clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no_clock")


def pytest_configure() -> None:
    """Mark what is started from here on, so that it is found even when its parent is gone."""
    os.environ[police.MARK] = uuid.uuid4().hex
    police.arena_folder().mkdir()
    os.environ[environment.ARENA_DIR] = str(police.arena_folder())
    # A shell's background jobs ignore some, and what tests start would inherit that.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    # One per process, kept until its end: started before the first test, it is no test's leak.
    resource_tracker.ensure_running()


def pytest_collection_finish() -> None:
    """Leave torch and Lightning, which collection has imported, out of every later collection of garbage.

    With them one takes 0.3 s, and each of some hundred tests needs one to see whether a file is closed.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the folder of the arenas."""
    shutil.rmtree(police.arena_folder(), ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _first_store() -> None:
    """The first store of a process opens a pipe that stays: made here, it is no test's leak."""
    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves processes, threads, files, shared memory, settings or a process group."""
    before = police.Scene.now()
    yield
    if found := police.leaks(before):
        pytest.fail("left behind: " + "; ".join(found))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends with the test."""
    with ExitStack() as stack:
        yield stack
