"""Random number generators of a process: Python, NumPy, torch, the device, and those that objects own."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_ckptless.internals.generator_memory import (
    NumpyState,
    PythonState,
    numpy_state,
    python_state,
    set_numpy_state,
    set_python_state,
)
from lightning_ckptless.trainer.state.object_attributes import attributes_of

MAX_ATTRIBUTES = 256


class RngState(NamedTuple):
    """State of all global generators of one process."""

    python: PythonState
    numpy: NumpyState | dict[str, Any]
    torch: bytes
    cuda: bytes | None


def capture_rng() -> RngState:
    """Return the current state of the global generators."""
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return RngState(python_state(), numpy_state(), torch.get_rng_state().numpy().tobytes(), cuda)


def apply_rng(state: RngState) -> None:
    """Restore the global generators."""
    set_python_state(state.python)
    set_numpy_state(state.numpy)
    torch.set_rng_state(_tensor(state.torch))
    if state.cuda is not None:
        torch.cuda.set_rng_state(_tensor(state.cuda))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def generators_of(owner: object) -> dict[str, Any]:
    """Return the `random.Random`, NumPy and torch generators that an object holds as attributes."""
    return {
        name: value
        for name, value in list(attributes_of(owner).items())[:MAX_ATTRIBUTES]
        if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)
    }


def owned_generators(owner: object) -> dict[str, Any]:
    """Return the states of the generators that an object holds as attributes."""
    return {name: state_of(generator) for name, generator in generators_of(owner).items()}


def state_of(generator: Any) -> Any:
    """Return the state of one generator."""
    if isinstance(generator, torch.Generator):
        return generator.device.type, generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=True) if isinstance(generator, np.random.RandomState) else generator.getstate()


def set_owned_generators(owner: object, states: dict[str, Any]) -> None:
    """Restore an object's generators, in place where they exist: other objects may share them."""
    for name, state in states.items():
        generator = getattr(owner, name, None)
        if not isinstance(generator, GENERATORS):
            # The owner creates it on first use, which the saved state is past.
            generator = _made_for(state)
            setattr(owner, name, generator)
        set_state(generator, state)


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _made_for(state: Any) -> Any:
    if isinstance(state, dict):
        return np.random.Generator(getattr(np.random, state["bit_generator"])())
    if isinstance(state[0], int):
        return random.Random()
    return np.random.RandomState() if isinstance(state[1], np.ndarray) else torch.Generator(state[0])


def set_state(generator: Any, state: Any) -> None:
    """Restore what `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(_tensor(state[1]))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
