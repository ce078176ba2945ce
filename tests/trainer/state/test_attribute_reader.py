"""Reading only what may have changed returns the same as reading everything, whatever is done to an object."""

from __future__ import annotations

import copy
import enum
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.formats.packing import LEAST_BYTES, PartCache, pack, unpack
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.changes import EVERYTHING, Policy, _Owner
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.plain_values import is_same, plain_attributes
from lightning_ckptless.trainer.state.rng import owned_generators
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer


class Holder:
    """Anything with attributes."""

    first: Any


class Phase(enum.IntEnum):
    FIRST = 1


@dataclass
class Record:
    count: int = 0
    seen: list[int] = field(default_factory=list)


class Stacked(list[Any]):
    """A list with a class of its own."""


class Labelled(int):
    """A number with an attribute of its own."""

    label = ""


VALUES: list[Callable[[], Any]] = [
    lambda: 1, lambda: True, lambda: 1.0, lambda: 0.0, lambda: -0.0, lambda: float("nan"), lambda: "text", lambda: b"1",
    lambda: None, lambda: Phase.FIRST, lambda: np.float64(0.0), lambda: np.int64(0), lambda: Labelled(1), list, dict,
    lambda: [1, 2.0], lambda: (1, [2]), lambda: {"a": [1], "b": {"c": 2}}, lambda: {1, 2}, lambda: [[1], [2]],
    lambda: [Holder()], lambda: {"a": Holder(), "b": [1]}, lambda: [np.zeros(2)], lambda: [b"1"], lambda: deque([1]),
    lambda: OrderedDict(a=1, b=2), lambda: torch.zeros(2), lambda: torch.nn.Parameter(torch.zeros(1)),
    lambda: np.zeros(2), lambda: bytearray(b"a"), Record, lambda: [Record()], Stacked,
    Holder, lambda: random.Random(1), lambda: torch.Generator().manual_seed(1), lambda: max,
]  # fmt: skip
ITEMS: list[Callable[[], Any]] = [
    lambda: 1, lambda: 1.0, lambda: True, lambda: -0.0, lambda: 0.0, lambda: np.int64(0), lambda: np.float64(0.0), list,
    lambda: b"", Holder, lambda: torch.ones(1), lambda: "a",
]  # fmt: skip
NAMES = ("first", "second", "left", "third")


def change(value: Any, item: Any) -> None:
    """Change a value in place, if it can be."""
    if isinstance(value, list | deque):
        inner = next((part for part in value if isinstance(part, list)), None)
        (value if inner is None or isinstance(item, Holder) else inner).append(item)
    elif isinstance(value, Record):
        value.count += 1
    elif isinstance(value, bytearray):
        value.append(1)
    elif isinstance(value, dict):
        first = next(iter(value), "a")
        # Its place in the order changes too.
        value.pop(first, None)
        value[first] = item
    elif isinstance(value, set):
        value.add(3) if 3 not in value else value.discard(3)
    elif isinstance(value, torch.Tensor):
        value.data.add_(1)
    elif isinstance(value, np.ndarray):
        value += 1
    elif isinstance(value, Labelled):
        value.label += "x"
    elif isinstance(value, random.Random):
        value.random()
    elif isinstance(value, torch.Generator):
        torch.rand(1, generator=value)


def replace_item(value: Any, item: Any) -> None:
    """Replace the last item of a list, whose length stays the same."""
    if isinstance(value, list) and value:
        value[-1] = item


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "change", "replace", "alias", "freeze", "read", "read"]),
        st.sampled_from(NAMES),
        st.sampled_from(VALUES),
        st.sampled_from(ITEMS),
    ),
    min_size=1,
    max_size=25,
)


def apply(owner: Any, action: str, name: str, value: Any, item: Any) -> None:
    attributes = vars(owner)
    if action == "set":
        attributes[name] = value
    elif action == "delete":
        attributes.pop(name, None)
    elif action == "alias":
        attributes[name] = attributes.get("first")
    elif action == "change":
        change(attributes.get(name), item)
    elif action == "replace":
        replace_item(attributes.get(name), item)
    elif action == "freeze" and isinstance(attributes.get(name), torch.nn.Parameter):
        # A parameter is no plain value, a tensor without gradient is.
        attributes[name].requires_grad_(not attributes[name].requires_grad)


def require_same(owner: Any, reader: AttributeReader, cache: PartCache) -> None:
    """Require that the compiled reading of an object is the plain one."""
    plain, expected = reader.plain(), plain_attributes(owner, leave={"left"})
    assert is_same(unpack(pack([cache.part(reader.changes, plain)])), unpack(pack([expected])))
    there = owned_generators(owner)
    assert is_same(reader.generators(), {name: there[name] for name in there if name != "left"})


@pytest.mark.parametrize("action", ["change", "replace"])
@pytest.mark.parametrize("value", range(len(VALUES)))
def test_every_change_of_one_value_is_seen(value: int, action: str) -> None:
    for before in ITEMS[-9:] if isinstance(VALUES[value](), list) else ITEMS[:1]:
        for after in ITEMS:
            owner, cache = Holder(), PartCache()
            vars(owner).update(first=VALUES[value](), second="x" * LEAST_BYTES)
            replace_item(owner.first, before())
            reader, watched = AttributeReader(owner), _Owner(owner, frozenset(), EVERYTHING)
            for _ in range(2):
                plain = reader.plain()
                cache.part(reader.changes, plain)
                watched.changed()
            apply(owner, action, "first", None, after())
            require_same(owner, reader, cache)
            assert is_same(watched.changed(), watched._find(vars(owner)))


@given(STEPS)
def test_what_is_read_is_what_there_is(steps: list[Any]) -> None:
    owner, cache = Holder(), PartCache()
    reader = AttributeReader(owner, {"left"})
    for action, name, make, item in [*steps, ("read", "", int, int)]:
        apply(owner, action, name, make(), item())
        if action == "read":
            require_same(owner, reader, cache)


@given(STEPS, st.sampled_from([EVERYTHING, Policy(captures_plain=False)]))
def test_changes_that_are_remembered_are_those_that_are_found(steps: list[Any], policy: Policy) -> None:
    owner = Holder()
    vars(owner).update(first=[1], second={"a": [Holder()]}, third=torch.zeros(2))
    watched = _Owner(owner, frozenset({"left"}), policy)
    for action, name, make, item in [*steps, ("read", "", int, int)]:
        apply(owner, action, name, make(), item())
        if action == "read":
            found = watched.changed()
            assert is_same(found, watched._find(vars(owner)))


# ---------------------------------------------------------------------- the whole host state


def disturb(trainer: Any, draw: random.Random) -> None:
    """Do something to the objects of a trainer."""
    module = trainer.lightning_module
    owner = draw.choice([module, module.layer, trainer.callbacks[-1], trainer.datamodule, module.inner, trainer])
    action = draw.choice(["set", "delete", "change", "change", "replace", "torch", "group", "none", "none"])
    if action == "torch":
        module.layer.weight.requires_grad_(not module.layer.weight.requires_grad)
        module.dropout.p = draw.choice([0.1, 0.2, True])
    elif action == "group":
        trainer.optimizers[0].param_groups[0]["lr"] = draw.random()
    elif action != "none":
        apply(owner, action, draw.choice(NAMES), draw.choice(VALUES)(), draw.choice(ITEMS)())


def without_memory(kept: HostState) -> HostState:
    """Return a host state that has captured nothing yet, and knows what was there at first."""
    fresh = HostState(kept.trainer, None, kept._surroundings)
    fresh._submodules = copy.copy(kept._submodules)
    of_others = fresh._submodules._of_others.items()
    fresh._submodules._readers = {name: AttributeReader(m, vars(torch.nn.Module())) for name, m in of_others}
    fresh._submodules._seen, fresh._submodules._numbers, fresh._submodules._facts_at = ([], []), {}, -1
    fresh._submodules._of_readers = None
    return fresh


class Inner(torch.nn.Module):
    """A module of the script."""


@pytest.mark.parametrize("seed", range(2))
def test_the_compiled_capture_is_the_plain_one(seed: int, tmp_path: Path) -> None:
    draw, captured = random.Random(seed), list[int]()

    def compare(trainer: Any, *_: Any) -> None:
        for _again in range(draw.randrange(3)):
            disturb(trainer, draw)
        [kept] = compiled
        found, expected = (unpack(pack(state.capture())) for state in (kept, without_memory(kept)))
        for state in (found, expected):
            for clocked in (state, *state["callbacks"], state["datamodule"]):
                clocked.pop("ages")
            # Whether gradients are kept, and an attribute was ever replaced, is known only to those who have seen it.
            state.pop("gradients")
            for read in (state["module"], state["module"]["submodules"], *state["callbacks"], state["datamodule"]):
                read.pop("held")
        assert [name for name in expected if not is_same(found[name], expected[name])] == []
        captured.append(trainer.global_step)

    compiled: list[HostState] = []
    module = tiny_module()
    module.inner, module.dropout, module.first = Inner(), torch.nn.Dropout(0.1), [1]
    data = pl.LightningDataModule.from_datasets(tiny_loader(64).dataset, batch_size=2)
    begin = callback(on_train_start=lambda trainer, *_: compiled.append(HostState(trainer)))
    trainer = tiny_trainer(tmp_path, callbacks=[begin, callback(on_train_batch_end=compare)], max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert captured[-1] == 64
