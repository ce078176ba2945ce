"""Tells in one pass over many objects whether anything has changed since each of them was last looked at.

Hundreds of attributes belong to the state, and few of them ever change. To look at one object takes a dozen calls. So
the attributes of all objects are compared at once, by the rules of `attribute_snapshot.py`. Only if something differs,
the objects are looked at one by one. One that has changed is left out for some captures, twice as many as the time
before: a counter of the script does not have all others looked at with every version.
"""

from __future__ import annotations

import marshal
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, call, getitem, is_
from typing import Any, Protocol

from lightning_ckptless.trainer.state.attribute_snapshot import AttributeSnapshot, Quiet, has_items
from lightning_ckptless.trainer.state.plain_values import is_record

_FIRST_WAIT = 4
_LONGEST_WAIT = 1024
"""Captures until an object that has changed is expected not to change any more."""
_CHANGES = attrgetter("changes")
_SEQUENCES = (list, tuple, set, frozenset, deque)


class Watched(Protocol):
    """An object that is looked at."""

    @property
    def owner(self) -> Callable[[], Any]:
        """Returns the object; None if it no longer exists."""

    @property
    def is_usual(self) -> bool:
        """Whether the object consists of its `__dict__`."""

    @property
    def seen(self) -> AttributeSnapshot:
        """Its attributes as of the last look."""

    @property
    def has_marks(self) -> bool:
        """Whether some of its values are compared by other means."""

    def is_as_marked(self) -> bool:
        """Return whether these values are as they were when the object was first seen."""


class Watch:
    """Compares the attributes of many objects.

    Args:
        watched: returns the objects, as of now.
    """

    def __init__(self, watched: Callable[[], Iterable[Watched]]) -> None:
        self._watched = watched
        self._captures = 0
        self._is_same = True
        self._due = 0
        self._waits: dict[AttributeSnapshot, tuple[int, int]] = {}
        self._flat = _Flat(())

    def begin(self) -> None:
        """Compare all objects. Until `end`, no code of the script may run, and `is_quiet` says what is unchanged.

        Called once per capture, which then looks at each object that is not quiet.
        """
        self._captures += 1
        self._is_same = self._flat.quiet.is_now = self._flat.is_same()

    def end(self) -> None:
        """End the capture."""
        self._flat.quiet.is_now = False
        if not self._is_same or self._captures >= self._due:
            self._arrange()

    def _arrange(self) -> None:
        """Choose the objects that are compared from now on, by what they were at their last look."""
        watched = list(self._watched())
        for seen in () if self._is_same else self._flat.differing():
            wait = min(max(_FIRST_WAIT, 2 * self._waits.get(seen, (0, 0))[0]), _LONGEST_WAIT)
            self._waits[seen] = wait, self._captures + wait
        self._waits = {each.seen: self._waits[each.seen] for each in watched if each.seen in self._waits}
        waiting = {seen: due for seen, (_, due) in self._waits.items() if due > self._captures}
        self._flat = _Flat(each for each in watched if each.seen not in waiting and _can_be_compared(each))
        self._due = min(waiting.values(), default=self._captures + _LONGEST_WAIT)


def _can_be_compared(watched: Watched) -> bool:
    is_known = watched.seen.names is not None and not watched.seen.unknown
    return is_known and watched.is_usual and watched.owner() is not None and watched.is_as_marked()


class _Flat:
    """What is compared, of all objects together."""

    def __init__(self, watched: Iterable[Watched]) -> None:
        every = self._every = list(watched)
        self.seen = [each.seen for each in every]
        self.quiet = Quiet()
        for seen in self.seen:
            seen.quiet = self.quiet
        self._changes = list(map(_CHANGES, self.seen))
        self._marked = [each for each in every if each.has_marks]
        self._owners = [each.owner for each in every]
        self._attributes = [vars(each.owner()) for each in every]
        self._names = list(chain.from_iterable(seen.names or () for seen in self.seen))
        self._sizes = [len(seen.names or ()) for seen in self.seen]
        pairs = list(zip(self._attributes, self.seen, strict=True))
        self._holders = list(chain.from_iterable(repeat(held, len(seen.kept)) for held, seen in pairs))
        self._keys = list(chain.from_iterable(seen.kept for seen in self.seen))
        self._values = list(chain.from_iterable(seen.values for seen in self.seen))
        with_text = [seen for seen in self.seen if seen.serialized]
        self._containers = [tuple(seen.serialized.values()) for seen in with_text]
        self._bytes = [seen.bytes for seen in with_text]
        self._items = _Items(chain.from_iterable(seen.items.values() for seen in self.seen))

    def differing(self) -> list[AttributeSnapshot]:
        """Return those that have changed."""
        pairs = zip(self.seen, self._changes, strict=True)
        changed = [seen for seen, changes in pairs if seen.changes != changes]
        if changed or not all(map(_can_be_compared, self._every)):
            return changed
        # Only `marshal` writes something else: it depends on how often an item is referred to.
        return self.seen

    def is_same(self) -> bool:
        """Return whether nothing has changed, so that a look at any of them would find nothing."""
        try:
            attributes = list(map(vars, map(call, self._owners)))
            now = list(map(marshal.dumps, map(list, self._containers)))
        except (TypeError, ValueError):
            # An object no longer exists, or a container holds something else by now.
            return False
        return (
            list(map(_CHANGES, self.seen)) == self._changes
            and all(map(is_, attributes, self._attributes))
            and list(map(len, attributes)) == self._sizes
            and list(chain.from_iterable(attributes)) == self._names
            and all(map(is_, map(getitem, self._holders, self._keys), self._values))
            and self._items.are_same()
            and now == self._bytes
            and all(each.is_as_marked() for each in self._marked)
        )


class _Items:
    """Containers of other objects, by the items that they had."""

    def __init__(self, containers: Iterable[tuple[Any, tuple[Any, ...]]]) -> None:
        every = list(containers)
        sequences = [(held, items) for held, items in every if type(held) in _SEQUENCES]
        mappings = [(held, items) for held, items in every if isinstance(held, dict) or _is_namespace(held)]
        known = {id(held) for held, _ in (*sequences, *mappings)}
        self._others = [(held, items) for held, items in every if id(held) not in known]
        self._records = [held for held, _ in mappings if _is_namespace(held)]
        self._attributes = list(map(vars, self._records))
        self._sequences = [held for held, _ in sequences]
        held_items = [(vars(held) if _is_namespace(held) else held) for held, _ in mappings]
        self._keys = [partial(_base_of(held).keys, held) for held in held_items]
        self._values = [partial(_base_of(held).values, held) for held in held_items]
        # Of a mapping, first all keys.
        halves = [(items[: len(items) // 2], items[len(items) // 2 :]) for _, items in mappings]
        parts = [*(items for _, items in sequences), *(keys for keys, _ in halves), *(values for _, values in halves)]
        self._sizes, self._parts = list(map(len, parts)), list(chain.from_iterable(parts))

    def are_same(self) -> bool:
        """Return whether all containers still have these items."""
        views = [*self._sequences, *map(call, self._keys), *map(call, self._values)]
        return (
            list(map(len, views)) == self._sizes
            and all(map(is_, chain.from_iterable(views), self._parts))
            and all(map(is_, map(vars, self._records), self._attributes))
            and all(has_items(held, items) for held, items in self._others)
        )


def _is_namespace(held: Any) -> bool:
    return is_record(held) and not isinstance(held, tuple) and hasattr(held, "__dict__")


def _base_of(mapping: Any) -> Any:
    # A class of the script may have methods of its own.
    return OrderedDict if isinstance(mapping, OrderedDict) else dict
