"""Reading a small state without the program that has written it.

Plain data may hold a class of the program: an enumeration in an attribute, a data class among the hyper-parameters. Out
here its module may be another one (`__main__`) or not there at all. Such a class is stood in for by one of the same
name, which keeps what it is given and is pickled as it was read, so that the program finds its own class again.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from types import ModuleType
from typing import Any


class _StandIn:
    """An object of a class that is not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stood_in_args = args
        self.stood_in_kwargs = kwargs
        self.stood_in_state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.stood_in_state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.stood_in_args, self.stood_in_state


def _stand_in(module: str, name: str) -> type:
    """A class of a name, where pickle will look for it."""
    if module not in sys.modules:
        sys.modules[module] = ModuleType(module)
    owner: Any = sys.modules[module]
    *path, last = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            setattr(owner, part, type(part, (), {}))
        owner = getattr(owner, part)
    made = type(last, (_StandIn,), {"__module__": module, "__qualname__": name})
    setattr(owner, last, made)
    return made


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The class of a name, or one that stands in for it."""
        try:
            found: Any = sys.modules.get(module) or importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return _stand_in(module, name)
        return found


def read_pickle(data: bytes) -> Any:
    """What was pickled by a program whose modules may not be there."""
    return _Unpickler(io.BytesIO(data)).load()
