"""Comparing many objects at once finds what looking at each of them finds, whatever is done to them."""

from __future__ import annotations

import gc
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.attribute_snapshot import AttributeSnapshot
from lightning_ckptless.trainer.state.changes import EVERYTHING, Changes
from lightning_ckptless.trainer.state.plain_values import is_same, plain_attributes
from lightning_ckptless.trainer.state.watch import Watch
from tests.trainer.state.test_attribute_reader import ITEMS, NAMES, VALUES, Holder, apply

ACTIONS = ["set", "delete", "change", "replace", "alias", "freeze", "share", "exchange", "look", "none", "none", "none"]
MADE = [make for make in VALUES if type(make()).__name__ != "Parameter"]


class Watching:
    """Some objects that are read, and others whose changes are tracked, all of them compared at once."""

    def __init__(self) -> None:
        self.read: list[Any] = [Holder() for _ in range(3)]
        self.tracked: list[Any] = [Holder() for _ in range(2)]
        for number, owner in zip(count(), [*self.read, *self.tracked]):
            vars(owner).update(first=[1, ("a", {2})], second=number, third={"a": 1.0, "b": Holder()})
        self.readers = [AttributeReader(owner) for owner in self.read]
        self.changes = Changes((str(number), owner) for number, owner in enumerate(self.tracked))
        self.watch = Watch(lambda: [*self.readers, *self.changes.watched])

    @property
    def seen(self) -> list[AttributeSnapshot]:
        return [each.seen for each in (*self.readers, *self.changes.watched)]

    def capture(self) -> Any:
        self.watch.begin()
        try:
            return [reader.plain() for reader in self.readers], self.changes.capture()
        finally:
            self.watch.end()

    def expected(self) -> Any:
        """What is there, found without any memory of earlier captures."""
        found = {path: owner._find(vars(owner.owner())) for path, owner in self.changes._owners.items()}
        return [plain_attributes(owner) for owner in self.read], {path: each for path, each in found.items() if each}

    def disturb(self, action: str, who: int, name: str, value: Any, item: Any) -> None:
        owners = [*self.read, *self.tracked]
        owner = owners[who]
        if action == "share":
            vars(owners[who - 1])[name] = vars(owner).get("first")
        elif action == "exchange":
            owner.__dict__ = dict(vars(owner))
        elif action == "look":
            # As a hook of the script does that is shown the state, apart from any capture.
            [reader.plain() for reader in self.readers]
            self.changes.capture()
        else:
            apply(owner, action, name, value, item)


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(ACTIONS),
                st.integers(0, 4),
                st.sampled_from(NAMES),
                st.sampled_from(MADE),
                st.sampled_from(ITEMS),
            ),
            max_size=3,
        ),
        min_size=3,
        max_size=30,
    )
)
def test_what_is_captured_is_what_there_is(versions: list[Any]) -> None:
    watching = Watching()
    for actions in versions:
        for action, who, name, make, item in actions:
            watching.disturb(action, who, name, make(), item())
        found = unpack(pack(watching.capture()))
        assert is_same(found, unpack(pack(watching.expected())))


@pytest.mark.parametrize("who", range(5))
@pytest.mark.parametrize("action", ["change", "replace", "set", "delete"])
def test_a_change_after_quiet_versions_is_found(action: str, who: int) -> None:
    for make in MADE:
        watching = Watching()
        vars([*watching.read, *watching.tracked][who]).update(first=make())
        for _ in range(7):
            watching.capture()
        watching.disturb(action, who, "first", "another", 7)
        assert is_same(unpack(pack(watching.capture())), unpack(pack(watching.expected()))), make()


def test_what_has_not_changed_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching()
    looks: list[AttributeSnapshot] = []
    look = AttributeSnapshot.look

    def note(seen: AttributeSnapshot, attributes: Any) -> Any:
        looks.append(seen)
        return look(seen, attributes)

    monkeypatch.setattr(AttributeSnapshot, "look", note)
    watching.capture()
    looks.clear()
    first = watching.capture()
    assert not looks and not any(seen.is_quiet for seen in watching.seen)
    watching.read[0].second += 1
    watching.capture()
    assert len(looks) == 5, "one of them has changed, so all are looked at"
    looks.clear()
    for _ in range(3):
        watching.read[0].second += 1
        watching.capture()
    assert looks == [watching.readers[0].seen] * 3, "only the one that has changed"
    assert first[0][1] is watching.capture()[0][1]


def test_an_object_that_is_gone_is_not_kept() -> None:
    watching = Watching()
    for _ in range(2):
        watching.capture()
    gone = watching.tracked.pop()
    gone.itself = gone
    watching.capture()
    del gone
    gc.collect()
    assert [owner.owner() is None for owner in watching.changes.watched] == [False, True]
    watching.read[1].second = "another"
    assert watching.capture()[0][1]["second"] == "another"


def test_a_marked_value_is_compared() -> None:
    holder: Any = Holder()
    holder.first = [Holder(), Holder()]
    changes = Changes([("holder", holder)], policy=EVERYTHING)
    watch = Watch(lambda: changes.watched)
    for _ in range(3):
        watch.begin()
        assert changes.capture() == {}
        watch.end()
    holder.first.append(Holder())
    watch.begin()
    changes.capture()
    watch.end()
    assert changes.lost() == ["holder.first"]
