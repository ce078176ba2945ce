"""Random number generators continue exactly, whichever object owns them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng, owned_generators, set_owned_generators


def draw() -> tuple[Any, ...]:
    """Draw from every global generator, including distributions that cache a second value."""
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(2).tolist(),
        torch.randn(1),
    )


def test_global_generators_are_restored() -> None:
    draw()
    state = capture_rng()
    expected = draw()
    draw()
    apply_rng(pickle.loads(pickle.dumps(state)))
    assert draw() == expected


def test_capturing_the_state_draws_nothing() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    undisturbed = [draw() for _ in range(2)]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    first = draw()
    capture_rng()
    assert [first, draw()] == undisturbed


def test_later_draws_do_not_change_a_captured_state() -> None:
    state = capture_rng()
    before = pickle.dumps(state)
    draw()
    assert pickle.dumps(state) == before


def test_another_generator_of_numpy_is_restored() -> None:
    generators: Any = np.random
    before = generators.get_bit_generator()
    generators.set_bit_generator(np.random.PCG64(1))
    try:
        state = capture_rng()
        expected = draw()
        apply_rng(pickle.loads(pickle.dumps(state)))
        assert draw() == expected
    finally:
        generators.set_bit_generator(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_generator_is_restored() -> None:
    torch.rand(1, device="cuda")
    state = capture_rng()
    expected = torch.rand(4, device="cuda")
    apply_rng(state)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


# ---------------------------------------------------------------------- owned ones


class Owner:
    """Anything with attributes."""


MADE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "python": (lambda: random.Random(1), lambda g: [g.random(), g.gauss(0, 1)]),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.normal(size=3).tolist()),
    "numpy, other bits": (lambda: np.random.Generator(np.random.Philox(1)), lambda g: g.normal(size=3).tolist()),
    "numpy, old": (lambda: np.random.RandomState(1), lambda g: [g.rand(), g.randn()]),
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
}


def owner_of(generator: Any) -> Any:
    owner = Owner()
    vars(owner).update(mine=generator, other=5)
    return owner


@pytest.mark.parametrize("kind", MADE)
def test_owned_generators_are_restored_in_place(kind: str) -> None:
    make, use = MADE[kind]
    owner = owner_of(make())
    use(owner.mine)
    states = pickle.loads(pickle.dumps(owned_generators(owner)))
    assert set(states) == {"mine"}
    expected = use(owner.mine)
    fresh = owner_of(make())
    shared = fresh.mine
    set_owned_generators(fresh, states)
    assert fresh.mine is shared
    assert use(shared) == expected


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("before", [{}, {"mine": None}], ids=["absent", "none"])
def test_a_missing_owned_generator_is_created(kind: str, before: dict[str, Any]) -> None:
    make, use = MADE[kind]
    owner, fresh = owner_of(make()), Owner()
    states = owned_generators(owner)
    vars(fresh).update(before)
    set_owned_generators(fresh, states)
    assert type(vars(fresh)["mine"]) is type(owner.mine)
    assert use(vars(fresh)["mine"]) == use(owner.mine)


def test_the_system_random_source_has_no_state() -> None:
    assert owned_generators(owner_of(random.SystemRandom())) == {}


def test_an_object_without_attributes_owns_no_generators() -> None:
    assert owned_generators([1]) == {}
    set_owned_generators([1], {})
