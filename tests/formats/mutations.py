"""Seeded random damage: changed bytes, and records with changed fields but a correct digest."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

MUTATIONS = 10_000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, -7, 1, 18, 2_000_000_000, 1 << 31, 1 << 53, 1 << 64, -(1 << 70), 10**400, 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd", "\0", "\ud800", "x" * 5000, "torch.float32",
    "torch.load", [], [[]], [None], [-1], [1, 2, 3], ["x"] * 40, {}, {"x": 1}, {"": {}}, {"pid": -7},
    [[[[[[[[[[0]]]]]]]]]],
)  # fmt: skip


def damaged(data: bytes, seed: int, count: int = MUTATIONS) -> Iterator[bytes]:
    """Yield randomly changed copies of some bytes.

    Args:
        data: original bytes.
        seed: seed of the changes.
        count: number of copies.
    """
    draw = random.Random(seed)
    made = 0
    while made < count:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            _change(changed, draw)
        if changed != data:
            made += 1
            yield bytes(changed)


def _change(data: bytearray, draw: random.Random) -> None:
    if not data:
        data += draw.randbytes(8)
    at, length = draw.randrange(len(data)), draw.choice((1, 1, 2, 8, 64))
    match draw.randrange(7):
        case 0 | 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            data[at : at + length] = draw.randbytes(length)
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at // 2 : at // 2 + length]
        case 5:
            data[at : at + length] = bytes(min(length, len(data) - at))
        case _:
            del data[at:]


def changed(value: Any, seed: int, count: int = MUTATIONS) -> Iterator[Any]:
    """Yield copies of a record with randomly changed values.

    Args:
        value: original record.
        seed: seed of the changes.
        count: number of copies.
    """
    draw, text = random.Random(seed), json.dumps(value)
    for _ in range(count):
        other = json.loads(text)
        for _ in range(draw.choice((1, 1, 2))):
            _replace(other, draw)
        yield other


def _replace(value: Any, draw: random.Random) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if not isinstance(value[key], dict | list) or not value[key] or draw.random() < 0.2:
            break
        value = value[key]
    match draw.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[str(draw.choice(ODD))[:30]] = copy.deepcopy(value[key])
        case 2 if type(value[key]) in (int, float):
            value[key] = value[key] * draw.choice((-1, 2, 1000)) + draw.choice((-1, 1, 64))
        case _:
            value[key] = copy.deepcopy(draw.choice(ODD))
