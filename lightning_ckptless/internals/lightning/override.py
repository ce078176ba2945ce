"""A method that is replaced on one object, so that the object can still be pickled and copied.

Programs copy what they train: an average of the model, a trainer for a second run, a loop for a test. A function in the
attributes of such an object cannot be pickled, and a copy that carried it along would act on the original. An override
is left behind by every copy: the copy has the method of its own class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Override:
    """Replaces a method of one object.

    Args:
        owner: the object; other objects of its class are not affected.
        name: of the method.
        function: called in its place.

    Attributes:
        original: the method that was replaced, bound to the object.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(owner, name)
        self.function = function
        self._owner = owner
        self._name = name
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in the place of the method."""
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the owner has no attributes yet when this is evaluated: the name gives the method of its class.
        return getattr, (self._owner, self._name)


def remove_overrides(owner: Any, *names: str) -> None:
    """Give an object the methods of its class back.

    Args:
        owner: the object.
        names: of methods; those that were not replaced are left alone.
    """
    for name in names:
        vars(owner).pop(name, None)
