"""Settings and fixtures for all tests; every test is checked for leaks."""

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
from tests import leaks


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option that runs the simulations with a single seed."""
    parser.addoption("--seed", type=int, help="run the simulations of recovery with this seed alone")


# The duration of an example is not meaningful on a busy machine.
settings.register_profile("no_clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A change is judged by the same examples as the one before it. `search` looks for new ones.
settings.register_profile("same", settings.get_profile("no_clock"), derandomize=True)
settings.register_profile("search", settings.get_profile("no_clock"), max_examples=2000)
settings.load_profile("same")


def pytest_configure() -> None:
    """Mark all processes started from now on, so that they are found even if their parent has exited."""
    os.environ[leaks.MARK] = uuid.uuid4().hex
    leaks.arena_folder().mkdir()
    os.environ[environment.ARENA_DIR] = str(leaks.arena_folder())
    # Background jobs of a shell ignore some signals, and processes started by tests would inherit that.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    # Runs until this process exits. Started before the first test, it is not reported as a leak.
    resource_tracker.ensure_running()


def pytest_collection_finish() -> None:
    """Exclude the objects of torch and Lightning, which are imported by now, from later garbage collections.

    With them a collection takes 0.3 s, and hundreds of tests need one to find out whether a file is closed.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the folder for arenas."""
    shutil.rmtree(leaks.arena_folder(), ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _first_store() -> None:
    """Create a store, as the first one opens a pipe that is never closed and would be reported as a leak."""
    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves anything behind (see `tests.leaks`)."""
    before = leaks.Snapshot.take()
    yield
    if found := leaks.find_leaks(before):
        pytest.fail("left behind: " + "; ".join(found))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Context managers that are exited at the end of the test."""
    with ExitStack() as stack:
        yield stack
