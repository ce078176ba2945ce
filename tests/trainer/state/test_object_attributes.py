"""State in slots, derived containers, closures, partial functions and classes is read and put back in place."""

from __future__ import annotations

import functools
import queue
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.changes import OBJECTS_LEFT_ALONE, Changes
from lightning_ckptless.trainer.state.held_states import HeldStates
from lightning_ckptless.trainer.state.object_attributes import MOST_ITEMS, attributes_of
from lightning_ckptless.trainer.state.reachability import has_attributes, reach


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("count", "seen", "unset")
    unset: Any

    def __init__(self) -> None:
        self.count, self.seen = 0, [0]


class Both(Slotted):
    """Has slots and a `__dict__`."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 1.5


@dataclass(slots=True)
class Checked:
    """Is no plain record, since it runs code of its own when it is created."""

    count: int = 0

    def __post_init__(self) -> None:
        self.count += 1


class Numbers(list[int]):
    """A list with an attribute, whose own method must not be called."""

    total = 0

    def extend(self, _: Any) -> None:
        raise AssertionError

    clear = None  # type: ignore[assignment]


class Named(dict[str, int]):
    """A dictionary of the script."""


class Ordered(OrderedDict[str, int]):
    """An ordered dictionary of the script."""


class Last(deque[int]):
    """A deque of the script."""


class Different(set[int]):
    """A set of the script."""


def counter() -> Callable[[], int]:
    count, seen = 0, list[int]()

    def step(also: list[int] = [0]) -> int:  # noqa: B006
        nonlocal count
        count += 1
        seen.append(count)
        also.append(count)
        return count + sum(seen) + sum(also)

    return step


def called() -> Callable[[], int]:
    def step() -> int:
        vars(step)["calls"] = vars(step).get("calls", 0) + 1
        return int(vars(step)["calls"])

    return step


def appended(to: list[int], *, also: dict[str, int]) -> int:
    to.append(len(to))
    also["n"] = also.get("n", 0) + 2
    return sum(to) + also["n"]


def use_slots(held: Slotted) -> Any:
    held.count += 1
    held.seen.append(held.count)
    held.unset = getattr(held, "unset", 0) + 2
    return held.count + sum(held.seen) + held.unset


def use_both(held: Both) -> Any:
    held.more *= 2
    return held.more + use_slots(held)


def use_record(held: Checked) -> int:
    held.count += 1
    return held.count


def use_numbers(held: Numbers) -> int:
    held.append(len(held))
    held.total += 1
    return sum(held) + held.total


def use_mapping(held: Any) -> Any:
    held["last"] = held.pop("last", 0) + 1
    held[str(held["last"])] = held["last"]
    return sum(held.values()) + 10 * list(held).index("last")


def use_deque(held: Last) -> int:
    held.append(sum(held) + 1)
    return sum(held)


def use_set(held: Different) -> int:
    held.add(len(held))
    return sum(held)


def use_queue(held: Any) -> Any:
    held.put(held.qsize() + 1)
    if held.qsize() > 2:
        held.get()
    return sum(held.queue)


def use_nested(held: Any) -> int:
    held["k"]["l"] += 1
    return int(held["k"]["l"])


def use_namespace(held: Any) -> Any:
    return use_slots(held.inner)


def use_list(held: Any) -> Any:
    return use_slots(held[0]) + use_slots(held[1]["a"])


def use_wrapped(held: Any) -> Any:
    return use_slots(held["a"])


def use_generator(held: Any) -> float:
    return float(held[0].unset.random())


def with_generator() -> list[Slotted]:
    held = Slotted()
    held.unset = np.random.default_rng(3)
    return [held]


def call(held: Any) -> Any:
    return held()


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "slots": (Slotted, use_slots),
    "slots and attributes": (Both, use_both),
    "record with slots": (Checked, use_record),
    "list": (Numbers, use_numbers),
    "dictionary": (Named, use_mapping),
    "ordered dictionary": (Ordered, use_mapping),
    "deque": (lambda: Last([1], maxlen=3), use_deque),
    "set": (Different, use_set),
    "default from a function": (lambda: defaultdict(lambda: defaultdict(int)), use_nested),
    "queue": (lambda: queue.Queue(maxsize=3), use_queue),
    "priorities": (queue.PriorityQueue, use_queue),
    "closure": (counter, call),
    "attribute of a function": (called, call),
    "partial function": (lambda: functools.partial(appended, [], also={}), call),
    "namespace of objects": (lambda: SimpleNamespace(inner=Slotted()), use_namespace),
    "wrapped dictionary of objects": (lambda: UserDict(a=Slotted()), use_wrapped),
    "list of objects": (lambda: [Slotted(), {"a": Slotted()}], use_list),
    "generator in a slot": (with_generator, use_generator),
}


class Watched:
    """A value with what watches it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._changes = Changes(reach(value, "value"), policy=OBJECTS_LEFT_ALONE)
        self._states = HeldStates({"owner": {"value": value}}, (), has_attributes)

    def capture(self) -> Any:
        return pack((self._changes.capture(), self._states.capture()))

    def apply(self, saved: Any) -> None:
        changes, states = unpack(saved)
        self._changes.apply(changes)
        self._states.apply(states)

    def lost(self) -> list[str]:
        return self._changes.lost()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_new", [False, True], ids=["survivor", "new process"])
def test_it_continues_from_the_version(kind: str, *, is_new: bool) -> None:
    make, use = KINDS[kind]
    first = Watched(make())
    saved = first.capture()
    for _ in range(3):
        use(first.value)
        saved = first.capture()
    expected = [use(first.value) for _ in range(3)]
    then = Watched(make()) if is_new else first
    then.apply(saved)
    assert [use(then.value) for _ in range(3)] == expected
    assert first.lost() == []


def test_an_attribute_made_since_is_removed() -> None:
    held = Watched(Slotted())
    saved = held.capture()
    use_slots(held.value)
    held.apply(saved)
    assert (held.value.count, held.value.seen, hasattr(held.value, "unset")) == (0, [0], False)


def test_a_container_that_becomes_too_large_is_named_once() -> None:
    held = Watched(Numbers())
    held.capture()
    for _ in range(2):
        list.extend(held.value, range(MOST_ITEMS))
        held.capture()
        assert len(held.value) > 0
    assert held.lost() == ["value.[]"]


def test_the_variables_of_a_class_are_set_on_the_class() -> None:
    class Counting:
        calls = 0
        seen: ClassVar[list[int]] = []

        def method(self) -> None: ...

    assert dict(attributes_of(Counting)) == {"calls": 0, "seen": []}
    changes = Changes([("class Counting", Counting)], policy=OBJECTS_LEFT_ALONE)
    Counting.calls += 1
    Counting.seen.append(1)
    Counting.made = 2  # type: ignore[attr-defined]
    saved = unpack(pack(changes.capture()))
    Counting.calls += 1
    changes.apply(saved)
    assert dict(attributes_of(Counting)) == {"calls": 1, "seen": [1], "made": 2}
    changes.apply({})
    assert dict(attributes_of(Counting)) == {"calls": 0, "seen": []}
