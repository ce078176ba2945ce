"""Frees what tests have read, so that later garbage collections do not have to scan it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.house.code import Source


@pytest.fixture(scope="module", autouse=True)
def _forget_trees(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("CODE", "TESTS"):
        sources: list[Source] = getattr(request.module, name, [])
        for source in sources:
            source.forget()
