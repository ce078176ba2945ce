"""Replaces a method of one object in such a way that the object can still be pickled and copied.

Scripts copy models, trainers and loops. A function in the attributes of such an object cannot be pickled, and in a copy
it would still act on the original. An override is not copied: a copy has the method of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Override:
    """Replaces a method of one object.

    Args:
        owner: object whose method is replaced; other objects of its class are not affected.
        name: name of the method.
        function: replacement.

    Attributes:
        original: the method that was replaced, bound to the object.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(owner, name)
        self.function = function
        self._owner = owner
        self._name = name
        # Scripts and tests replace methods of one object, too.
        self._replaced = vars(owner).get(name, _ABSENT)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self.function(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was replaced: a method of the class, or another replacement."""
        if self._replaced is _ABSENT:
            vars(self._owner).pop(self._name, None)
        else:
            setattr(self._owner, self._name, self._replaced)

    def __reduce__(self) -> tuple[Any, ...]:
        # When this is evaluated, a copy of the owner has no attributes yet, so the name refers to its class's method.
        return getattr, (self._owner, self._name)


def remove_overrides(owner: Any, *names: str) -> None:
    """Restore the methods of an object that overrides have replaced.

    Args:
        owner: the object.
        names: names of methods; those that no override replaces now are left as they are.
    """
    for name in names:
        while isinstance(found := vars(owner).get(name), Override):
            found.remove()
