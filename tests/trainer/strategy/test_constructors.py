"""The constructors of the strategies take the options, as they are declared."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import lightning_ckptless
from lightning_ckptless.configuration.option import options_of
from lightning_ckptless.configuration.ranges import ANYTHING
from lightning_ckptless.options import CkptlessOptions

STRATEGIES = ("CkptlessStrategy", "CkptlessModelParallelStrategy")
OPTIONS = options_of(CkptlessOptions)


def parameters_of(strategy: Any) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(strategy, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("name", STRATEGIES)
def test_names_defaults_and_types_are_those_of_the_options(name: str) -> None:
    taken = {name: (p.annotation, p.default) for name, p in parameters_of(getattr(lightning_ckptless, name)).items()}
    # Folders may also be given as text.
    expected = {
        name: (str | Path | None if option.kind is Path else option.type, option.default)
        for name, option in OPTIONS.items()
    }
    assert {name: taken.get(name) for name in OPTIONS} == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_other_parameters_are_those_of_lightning(name: str) -> None:
    strategy: Any = getattr(lightning_ckptless, name)
    bases = [base for base in strategy.__mro__ if base.__module__.startswith("lightning.")]
    theirs = {parameter for base in bases for parameter in inspect.signature(base.__init__).parameters}
    assert set(parameters_of(strategy)) <= {*OPTIONS, *theirs}


@pytest.mark.parametrize("name", STRATEGIES)
def test_options_are_documented(name: str) -> None:
    strategy: Any = getattr(lightning_ckptless, name)
    described = " ".join(" ".join(f"{base.__doc__} {base.__init__.__doc__}".split()) for base in strategy.__mro__)
    assert [option.name for option in OPTIONS.values() if f" {option.name}: {option.text}." not in described] == []


def test_every_option_has_a_range_and_a_default_within() -> None:
    for option in OPTIONS.values():
        assert option.range is not ANYTHING, option.name
        option.require(option.default)
    assert CkptlessOptions() == CkptlessOptions(**{option.name: option.default for option in OPTIONS.values()})


@pytest.mark.parametrize("name", STRATEGIES)
def test_options_arrive(name: str) -> None:
    strategy = getattr(lightning_ckptless, name)(mirror_every_n_steps=3, durable_dir="states")
    assert strategy.options == CkptlessOptions(mirror_every_n_steps=3, durable_dir=Path("states"))
