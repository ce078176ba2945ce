"""Methods of one object that are replaced, and put back."""

from __future__ import annotations

import copy
import pickle
from unittest.mock import Mock

from lightning_ckptless.internals.lightning.override import Override, remove_overrides


class Loop:
    """A loop with a method."""

    def run(self) -> str:
        """The name of the method."""
        return "run"


def test_a_method_of_the_class_is_put_back() -> None:
    loop = Loop()
    override = Override(loop, "run", lambda: f"around {override.original()}")
    outer = Override(loop, "run", lambda: f"around {outer.original()}")
    assert loop.run() == "around around run"
    remove_overrides(loop, "run")
    assert (loop.run(), vars(loop)) == ("run", {})


def test_what_a_script_has_put_in_place_of_a_method_is_put_back() -> None:
    loop = Loop()
    mock = loop.run = Mock(return_value="mock")  # type: ignore[method-assign]
    override = Override(loop, "run", lambda: f"around {override.original()}")
    assert loop.run() == "around mock"
    remove_overrides(loop, "run")
    assert loop.run is mock and mock.call_count == 1


def test_what_a_script_has_put_in_place_of_an_override_is_left() -> None:
    loop = Loop()
    Override(loop, "run", lambda: "override")
    mock = loop.run = Mock()  # type: ignore[method-assign]
    remove_overrides(loop, "run")
    assert loop.run is mock


def test_a_copy_has_the_method_of_its_class() -> None:
    loop = Loop()
    Override(loop, "run", lambda: "override")
    for copied in (copy.deepcopy(loop), pickle.loads(pickle.dumps(loop))):
        assert copied.run() == "run"
