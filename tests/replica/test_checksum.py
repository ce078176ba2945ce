"""Checksums depend on the bytes only, not on buffers or threads."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.replica import checksum
from lightning_ckptless.replica.checksum import ALGORITHMS, NO_CHECKSUM, digest, joined, matches
from lightning_ckptless.replica.thread_count import MOST_THREADS, threads_of_a_rank

BYTES = 10_000


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(BYTES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "PIECE_BYTES", 1024)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("cuts", [(), (1,), (1024, 2048), (100, 100, 9_999)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_digest_does_not_depend_on_how_the_bytes_are_divided(
    algorithm: str, cuts: tuple[int, ...], threads: int, data: bytes
) -> None:
    edges = (0, *cuts, BYTES)
    parts = [data[begin:end] for begin, end in pairwise(edges)]
    found = digest(algorithm, parts, threads=threads)
    assert found == digest(algorithm, [data], threads=threads)
    assert found.startswith(f"{algorithm}*1024:" if threads > 1 else f"{algorithm}:")
    assert all(matches(found, parts, threads=reading) for reading in (1, 4))


@pytest.mark.parametrize("at", [0, 1023, 1024, BYTES - 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_changed_byte_changes_the_digest(at: int, threads: int, data: bytes) -> None:
    found = digest("xxh3", [data], threads=threads)
    changed = bytearray(data)
    changed[at] ^= 1
    assert not matches(found, [bytes(changed)])
    assert not matches(found, [data[:-1]])
    assert not matches(found, [data, b"\0"])


def test_swapped_pieces_are_detected(data: bytes) -> None:
    found = digest("xxh3", [data], threads=2)
    assert not matches(found, [data[1024:2048], data[:1024], data[2048:]])


def test_a_known_prefix_may_have_a_digest_of_its_own(data: bytes) -> None:
    first, rest = data[:3_000], data[3_000:]
    found = joined(3_000, digest("xxh3", [first]), digest("xxh3", [rest], threads=2))
    assert matches(found, [data[:5_000], data[5_000:]])
    assert not matches(found, [data[:5_000], data[5_000:-1] + b"x"])


@pytest.mark.parametrize("unknown", ["md5:00", "xxh3*:00", "xxh3*0:00", "xxh3*x:00", "md5*4:00"])
def test_a_digest_of_an_unknown_kind_does_not_match(unknown: str, data: bytes) -> None:
    assert not matches(unknown, [data])


def test_without_a_checksum_nothing_is_read(data: bytes) -> None:
    assert digest(NO_CHECKSUM, [data], threads=4) == ""
    assert matches("", [data])


@given(ranks=st.integers(1, 64), cores=st.integers(1, 256))
def test_ranks_do_not_use_more_cores_than_available(ranks: int, cores: int) -> None:
    beside, alone = (threads_of_a_rank(ranks, beside_training=beside, cores=cores) for beside in (True, False))
    assert 1 <= beside <= alone <= MOST_THREADS
    assert alone == 1 or ranks * alone <= cores
    assert beside == 1 or 2 * ranks * beside <= cores
