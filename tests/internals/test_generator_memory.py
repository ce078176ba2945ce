"""The states read from memory are those that the public functions return."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lightning_ckptless.internals import generator_memory
from lightning_ckptless.internals.generator_memory import (
    WORDS,
    numpy_state,
    python_state,
    set_numpy_state,
    set_python_state,
)


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Leave the global generators as they were."""
    before = random.getstate(), np.random.get_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def public_python() -> Any:
    _, twister, gauss = random.getstate()
    return struct.pack(f"{WORDS + 1}I", *twister), gauss


def public_numpy() -> Any:
    state: Any = np.random.get_state(legacy=True)
    _, key, position, has_gauss, gauss = state
    return key.tobytes() + struct.pack("I", position), has_gauss, gauss


DRAWS: list[Callable[[], Any]] = [
    random.random, lambda: random.gauss(0, 1), lambda: random.seed(3), np.random.rand, np.random.randn,
    lambda: np.random.seed(4), lambda: np.random.rand(700),
]  # fmt: skip


def test_both_generators_are_found_in_memory() -> None:
    assert generator_memory._place_in_random() is not None
    assert generator_memory._place_in_random_state() is not None


def test_what_is_read_is_what_the_public_functions_return() -> None:
    for draw in DRAWS * 2:
        draw()
        assert python_state() == public_python()
        assert numpy_state() == public_numpy()


def test_states_that_are_not_found_in_memory_are_read_by_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("_place_in_random", "_place_in_random_state"):
        monkeypatch.setattr(generator_memory, place, lambda: None)
    test_what_is_read_is_what_the_public_functions_return()


def test_the_states_are_restored() -> None:
    for draw in DRAWS:
        draw()
        before, expected = (python_state(), numpy_state()), [random.gauss(0, 1), np.random.randn(), random.random()]
        random.seed(1)
        np.random.seed(1)
        set_python_state(before[0])
        set_numpy_state(before[1])
        assert [random.gauss(0, 1), np.random.randn(), random.random()] == expected


def test_a_layout_that_is_not_confirmed_is_not_used() -> None:
    assert generator_memory._confirmed(16, lambda: False) is None
    assert generator_memory._confirmed(-4, lambda: True) is None
