"""Reads the states of Python's and NumPy's global generators from their memory, in a microsecond each.

Both are Mersenne Twisters: 624 words and a position. The public functions convert each word to an object, which takes
20 and 100 microseconds, several times per step. The words are contiguous in the memory of the generator. Their offset
is found once, by a search for the known state of another generator of the same class, and confirmed as that one
advances.
A generator that is not confirmed is read by its public functions.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

WORDS = 624
STATE_BYTES = 4 * (WORDS + 1)
"""The words, then the position: an index into the words."""
_GAUSS = struct.Struct("i4xd")
_DRAWS = 5


PythonState = tuple[bytes, float | None]
"""Words and position of a `random.Random`, and the second value of its last Gaussian pair, if that is still to come."""
NumpyState = tuple[bytes, int, float]
"""Words and position of a `numpy.random.RandomState`, whether a second Gaussian value is still to come, that value."""


def python_state() -> PythonState:
    """Return the state of the generator behind the functions of `random`."""
    generator = random.getstate.__self__  # type: ignore[attr-defined]
    place = _place_in_random()
    return _public_python_state(generator) if place is None else _python_state_at(generator, place)


def set_python_state(state: PythonState) -> None:
    """Restore what `python_state` returned."""
    twister, gauss = state
    random.setstate((random.Random.VERSION, struct.unpack(f"{WORDS + 1}I", twister), gauss))


def numpy_state() -> NumpyState | dict[str, Any]:
    """Return the state of the generator behind the functions of `numpy.random`; a dictionary if it is no MT19937."""
    generator = np.random.get_state.__self__  # type: ignore[attr-defined]
    place, bits = _place_in_random_state(), generator._bit_generator
    if place is None or type(bits) is not np.random.MT19937:
        return _public_numpy_state(generator)
    return _numpy_state_at(generator, bits, place)


def set_numpy_state(state: NumpyState | dict[str, Any]) -> None:
    """Restore what `numpy_state` returned."""
    if isinstance(state, dict):
        np.random.set_state(state)
        return
    data, has_gauss, gauss = state
    twister = np.frombuffer(data, np.uint32)
    np.random.set_state(("MT19937", twister[:WORDS], int(twister[WORDS]), has_gauss, gauss))


# ---------------------------------------------------------------------- public functions


def _public_python_state(generator: random.Random) -> PythonState:
    _, twister, gauss = generator.getstate()
    return struct.pack(f"{WORDS + 1}I", *twister), gauss


def _public_numpy_state(generator: Any) -> NumpyState | dict[str, Any]:
    state: dict[str, Any] = generator.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return state
    twister = state["state"]["key"].astype(np.uint32).tobytes() + struct.pack("I", state["state"]["pos"])
    return twister, int(state["has_gauss"]), float(state["gauss"])


# ---------------------------------------------------------------------- memory


def _python_state_at(generator: Any, place: int) -> PythonState:
    found = ctypes.string_at(id(generator) + place, STATE_BYTES)
    # The position precedes the words.
    return found[4:] + found[:4], generator.gauss_next


def _numpy_state_at(generator: Any, bits: Any, place: int) -> NumpyState:
    has_gauss, gauss = _GAUSS.unpack(ctypes.string_at(id(generator) + place, _GAUSS.size))
    return ctypes.string_at(bits.ctypes.state_address, STATE_BYTES), has_gauss, gauss


@cache
def _place_in_random() -> int | None:
    probe = random.Random(5)
    words = _public_python_state(probe)[0][: 4 * WORDS]
    place = _find(probe, words) - 4

    def agrees() -> bool:
        probe.gauss(0.0, 1.0)
        return _python_state_at(probe, place) == _public_python_state(probe)

    return _confirmed(place, agrees)


@cache
def _place_in_random_state() -> int | None:
    probe = np.random.RandomState(5)
    probe.standard_normal()
    place = _find(probe, struct.pack("d", probe.get_state(legacy=False)["gauss"])) - 8

    def agrees() -> bool:
        probe.standard_normal()
        return _numpy_state_at(probe, probe._bit_generator, place) == _public_numpy_state(probe)

    return _confirmed(place, agrees)


def _find(generator: Any, pattern: bytes) -> int:
    """Return where in the memory of an object a pattern is; a negative number if it is not there exactly once."""
    if sys.implementation.name != "cpython":
        return -STATE_BYTES
    memory = ctypes.string_at(id(generator), type(generator).__basicsize__)
    return memory.index(pattern) if memory.count(pattern) == 1 else -STATE_BYTES


def _confirmed(place: int, agrees: Callable[[], bool]) -> int | None:
    return place if place >= 0 and all(agrees() for _ in range(_DRAWS)) else None
