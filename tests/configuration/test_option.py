"""Options as fields of dataclasses, and what is derived from them."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_ckptless.configuration.documentation import documented
from lightning_ckptless.configuration.flags import add_flags, given_flags, help_of, switches
from lightning_ckptless.configuration.option import Options, about, option, option_of, options_of
from lightning_ckptless.configuration.ranges import constant, integer, number, positive, share, text, texts
from lightning_ckptless.configuration.variables import variables_of, with_variables
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import CkptlessOptions


@dataclass(frozen=True, kw_only=True)
class Timing(Options):
    """One group."""

    every_s: float | None = option(
        None, "seconds between two", positive(), unit="seconds", none="never", flag="--every", variable="EVERY"
    )
    mode: Literal["fast", "slow"] = option("fast", "speed")


@dataclass(frozen=True, kw_only=True)
class Places(Options):
    """Another group."""

    folder: Path | None = option(None, "where", none="nowhere", flag="--folder", variable="FOLDER")
    names: tuple[str, ...] = option((), "of things", flag="--name", metavar="NAME")
    is_open: bool = option(False, "whether it is open", flag="--open")
    size: int | Literal["auto"] = option(3, "of it", integer(1) | constant("auto"), flag="--size")
    extra: dict[str, int] = field(default_factory=dict, metadata=about("more"))


@dataclass(frozen=True, kw_only=True)
class Both(Timing, Places):
    """Both groups."""


@dataclass(frozen=True, kw_only=True)
class Asked(Options):
    """Options that are left open."""

    is_open: bool | None = option_of(Both, "is_open", none="Both's", flag="--open")


def test_options_come_in_the_order_of_their_groups() -> None:
    assert list(options_of(Both)) == ["every_s", "mode", "folder", "names", "is_open", "size", "extra"]
    assert options_of(Both)["extra"].default == {}
    assert options_of(Both)["every_s"].text == "seconds between two; None for never"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every_s": 0}, "every_s=0: expected a number greater than 0, or None"),
        ({"every_s": float("nan")}, "every_s=nan: expected"),
        ({"every_s": "1"}, "every_s='1': expected"),
        ({"mode": None}, "mode=None: expected one of 'fast', 'slow'"),
        ({"folder": 3}, "folder=3: expected a path, or None"),
        ({"is_open": "yes"}, "is_open='yes': expected True or False"),
        ({"size": "big"}, "size='big': expected an integer of at least 1, or 'auto'"),
        ({"size": 1.0}, "size=1.0: expected"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError) as refused:
        Both(**given)
    assert str(refused.value).startswith(message)


def test_values_in_range() -> None:
    made = Both(every_s=1, mode="slow", folder="a/b", size="auto", is_open=True)  # type: ignore[arg-type]
    assert (made.folder, made.size) == (Path("a/b"), "auto")
    assert Asked().is_open is None


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        (number(0), [0, 0.5, float("inf")], [-1, float("nan"), "1", None]),
        (share(), [0.01, 1], [0, 1.1, None]),
        (text("[a-z]+", "letters"), ["ab"], ["", "a1", "a\n", 3]),
        (texts("[a-z]+", "words"), [[], ["ab", "c"], ("ab",), {"ab"}], ["ab", [3], ["a1"], 3]),
    ],
)
def test_ranges(values: Any, inside: list[Any], outside: list[Any]) -> None:
    assert [value for value in inside if not values.admits(value)] == []
    assert [value for value in outside if values.admits(value)] == []


def test_flags() -> None:
    parser = ArgumentParser()
    add_flags(parser, Both)
    words = ["--every", "2.5", "--folder=x", "--name", "a", "--name", "b", "--open", "--size", "7"]
    given = given_flags(parser.parse_args(words), Both)
    assert given == {"every_s": 2.5, "folder": Path("x"), "names": ["a", "b"], "is_open": True, "size": 7}
    assert given_flags(parser.parse_args([]), Both) == {}
    help_ = parser.format_help()
    assert "--every SECONDS" in help_
    assert "seconds between two (default: never)" in help_
    assert "--folder FOLDER" in help_
    assert switches(Both) == {"--open"}
    assert help_of(options_of(Both)["size"]) == "of it (default: 3)"


def test_flags_that_leave_an_option_open() -> None:
    parser = ArgumentParser()
    add_flags(parser, Asked)
    assert switches(Asked) == {"--open", "--no-open"}
    assert given_flags(parser.parse_args(["--no-open"]), Asked) == {"is_open": False}
    assert "whether it is open (default: Both's)" in " ".join(parser.format_help().split())


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    passed = variables_of(Both(every_s=1.5, folder=Path("x")))
    assert passed == {"EVERY": "1.5", "FOLDER": str(tmp_path / "x")}
    assert variables_of(Both()) == {}
    assert with_variables(Both(size=4), passed) == Both(every_s=1.5, folder=tmp_path / "x", size=4)
    with pytest.raises(OptionsError, match="EVERY='often': expected a number greater than 0, or None"):
        with_variables(Both(), {"EVERY": "often"})


def test_docstrings() -> None:
    @documented(Timing)
    class Described:
        """A class.

        Args:
            own: an argument.

        Raises:
            OptionsError: never.
        """

    assert Described.__doc__ == (
        "A class.\n\nArgs:\n    every_s: seconds between two; None for never.\n    mode: speed.\n"
        "    own: an argument.\n\nRaises:\n    OptionsError: never."
    )


def test_replicas_cannot_be_compared_without_a_checksum() -> None:
    with pytest.raises(OptionsError, match="checksum='none' computes none: choose another"):
        CkptlessOptions(replicas="verify", checksum="none")
    assert not CkptlessOptions(checksum="none").verifies_replicas
    assert not CkptlessOptions(replicas="send").verifies_replicas
    assert CkptlessOptions().verifies_replicas and CkptlessOptions(replicas="verify").verifies_replicas
