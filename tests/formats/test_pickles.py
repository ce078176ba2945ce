"""Only plain data and opted-in classes are admitted from a pickle, and nothing runs before it is admitted."""

from __future__ import annotations

import datetime as dt
import enum
import os
import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ckptless.formats import packing
from lightning_ckptless.formats.packing import LEAST_BYTES, Part, PartCache, pack, unpack
from lightning_ckptless.formats.pickles import Packed, UntrustedError, admit


class Colour(enum.Enum):
    RED = (1, "r")
    BLUE = (2, "b")


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Cursor:
    def __init__(self) -> None:
        self.at = 3


class Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


PLAIN: list[Any] = [
    None, True, 7, -(10**30), 2.5, 1 + 2j, "text", b"bytes", bytearray(b"x"), (1, (2,)), [1, [2]], {"a": {1, 2}},
    frozenset({3}), range(5), slice(1, 2), Counter("aab"), OrderedDict(a=1), deque([1, 2], maxlen=4),
    defaultdict(list, a=[1]), dt.datetime(2026, 1, 2, tzinfo=dt.UTC), dt.timedelta(seconds=3), Path("/a/b"),
    Colour.BLUE, Flag.A | Flag.B, {Colour.RED: [Flag.B]},
    np.float32(2.5), np.arange(6).reshape(2, 3), np.array(["a", "b"]), np.dtype("int16"), np.datetime64("2026-01-02"),
    torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3]), random.Random(3).getstate(),
    np.random.default_rng(3).bit_generator.state,
]  # fmt: skip
TENSORS: list[torch.Tensor] = [
    torch.arange(6.0).reshape(2, 3), torch.empty(0, 3), torch.tensor(2, dtype=torch.int8), torch.ones(3).to_sparse(),
    torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_is_admitted_unchanged(value: Any) -> None:
    found = unpack(admit(bytes(pack(value))))
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


@pytest.mark.parametrize("value", TENSORS, ids=lambda value: f"{type(value).__name__}-{value.dtype}-{value.layout}")
def test_tensors_of_every_kind_are_admitted_unchanged(value: torch.Tensor) -> None:
    found = unpack(admit(bytes(pack({"x": value}))))["x"]
    assert (type(found), found.dtype, found.layout) == (type(value), value.dtype, value.layout)
    plain = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in (found, value)]
    assert torch.equal(*plain)


def test_shared_tensors_stay_shared() -> None:
    whole = torch.nn.Parameter(torch.arange(4.0))
    first, second = unpack(admit(bytes(pack([whole, whole]))))
    assert first is second


def planted(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """Malicious pickles, with a part of the expected error message."""
    runs = Runs(tmp_path / "made")
    return {
        "a call": (pickle.dumps(runs), "posix.mkdir"),
        "deep inside": (bytes(pack({"a": [1, {"b": runs}]})), "posix.mkdir"),
        "inside another one": (bytes(pack({"a": Packed(pickle.dumps(runs))})), "posix.mkdir"),
        "inside a part": (bytes(pack({"a": Part(Packed(pickle.dumps(runs)))})), "posix.mkdir"),
        "a part that is computed": (computed_part(), "damaged"),
        "an old instruction": (b"cposix\nmkdir\n(S'/made'\ntR.", "GLOBAL at byte 0"),
        "getattr": (pickle.dumps([getattr, Path("x").exists]), "builtins.getattr"),
        "torch's own storage": (pickle.dumps(torch.ones(2)), "torch.storage._load_from_bytes"),
        "a name that is computed": (computed_name(), "damaged"),
        "a class as enumeration": (bytes(pack(Colour.RED)).replace(b"Colour", b"Cursor"), "not an enumeration"),
        "a class of the script": (bytes(pack(Cursor())), "tests.formats.test_pickles.Cursor"),
        "allocation by a number": (b"\x80\x05K\x01r\xff\xff\xff\xff.", "LONG_BINPUT"),
        "nothing": (b"", "damaged"),
    }  # fmt: skip


def computed_name() -> bytes:
    """Return a pickle with `str(b'posix', 'ascii')` as the name of a module."""
    module = b"\x8c\x08builtins\x8c\x03str\x93C\x05posix\x8c\x05ascii\x86R"
    return b"\x80\x05" + module + b"\x8c\x05mkdir\x93\x8c\x05/made\x85R."


def computed_part() -> bytes:
    """Return a pickle with a part whose bytes are the result of a call."""
    made = b"\x8c\x08builtins\x8c\x05bytes\x93K\x02\x85R"
    name = b"\x8c\x22lightning_ckptless.formats.packing\x8c\x09open_part\x93"
    return b"\x80\x05" + name + made + b"\x85R."


def test_pickle_would_call_a_computed_name() -> None:
    """The attack is real: `pickle` itself calls the function with the computed name."""
    with pytest.raises(OSError, match="made"):
        pickle.loads(computed_name().replace(b"\x05/made", b"\x09/x/y/made"))


@pytest.mark.parametrize("what", planted(Path()))
def test_a_malicious_pickle_is_refused_without_effect(what: str, tmp_path: Path) -> None:
    data, message = planted(tmp_path)[what]
    with pytest.raises(UntrustedError, match=message):
        admit(data)
    assert not (tmp_path / "made").exists()


@dataclass
class Record:
    at: int = 0


@dataclass
class Prepared(Record):
    def __post_init__(self) -> None:
        self.at += 1


def test_records_of_the_script_are_admitted() -> None:
    assert unpack(admit(bytes(pack([Record(3)])))) == [Record(3)]
    with pytest.raises(UntrustedError, match="Prepared, which is neither plain data nor opted in"):
        admit(bytes(pack(Prepared(3))))


def test_opted_in_classes_are_admitted() -> None:
    packed = pack({"cursor": Cursor(), "inner": pack([Cursor()])})
    admitted = admit(bytes(packed), ["tests.formats.test_pickles.Cursor"])
    assert unpack(admitted)["cursor"].at == 3
    with pytest.raises(UntrustedError) as found:
        admit(bytes(packed), ["tests.formats.test_pickles.Curs"])
    assert found.value.name == "tests.formats.test_pickles.Cursor"


def test_parts_are_read_as_their_values() -> None:
    value = {"names": ["a", 1.5], "tensor": torch.ones(2)}
    packed = pack({"part": Part(pack(value)), "nested": [Part(pack(Part(pack(7))))]})
    for found in (unpack(packed), unpack(admit(bytes(packed)))):
        assert found["part"]["names"] == ["a", 1.5] and torch.equal(found["part"]["tensor"], torch.ones(2))
        assert found["nested"] == [7]


def test_a_part_is_packed_again_only_when_it_has_changed() -> None:
    cache, value = PartCache(), ["x" * LEAST_BYTES]
    assert cache.part(1, value) is value
    part = cache.part(1, value)
    value.append("later")
    assert isinstance(part, Part) and cache.part(1, value) is part
    assert unpack(pack(part)) == value[:1]
    assert cache.part(2, value) is value
    assert unpack(pack(cache.part(2, value))) == value


def test_a_small_value_is_no_part() -> None:
    cache, value = PartCache(), [1]
    assert [cache.part(0, value) for _ in range(3)] == [value] * 3


def test_bytes_of_unknown_origin_are_not_unpickled() -> None:
    with pytest.raises(TypeError, match="of unknown origin"):
        unpack(pickle.dumps(1))  # type: ignore[arg-type]


def test_new_kinds_are_noticed() -> None:
    class Fresh(dict[str, int]):
        pass

    before = len(packing.KINDS)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(Fresh())
    assert len(packing.KINDS) > before
