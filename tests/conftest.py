"""For every test: it leaves nothing behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from tests import police


def pytest_configure() -> None:
    """Mark what is started from here on, so that it is found even when its parent is gone."""
    os.environ[police.MARK] = uuid.uuid4().hex
    # One per process, kept until its end: started before the first test, it is no test's leak.
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves processes, threads, files, shared memory, settings or a process group."""
    before = police.Scene.now()
    yield
    if found := police.leaks(before):
        pytest.fail("left behind: " + "; ".join(found))
