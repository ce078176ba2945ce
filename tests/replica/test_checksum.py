"""Digests: the same whoever reads and however the bytes lie, another one for any other byte."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.replica import checksum
from lightning_ckptless.replica.checksum import ALGORITHMS, NO_CHECKSUM, digest, joined, matches
from lightning_ckptless.replica.cores import MOST_THREADS, threads_of_a_rank

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
def test_a_digest_is_of_the_bytes_and_not_of_how_they_lie(
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
def test_another_byte_is_another_digest(at: int, threads: int, data: bytes) -> None:
    found = digest("xxh3", [data], threads=threads)
    changed = bytearray(data)
    changed[at] ^= 1
    assert not matches(found, [bytes(changed)])
    assert not matches(found, [data[:-1]])
    assert not matches(found, [data, b"\0"])


def test_pieces_that_change_places_are_noticed(data: bytes) -> None:
    found = digest("xxh3", [data], threads=2)
    assert not matches(found, [data[1024:2048], data[:1024], data[2048:]])


def test_what_was_known_before_may_have_a_digest_of_its_own(data: bytes) -> None:
    first, rest = data[:3_000], data[3_000:]
    found = joined(3_000, digest("xxh3", [first]), digest("xxh3", [rest], threads=2))
    assert matches(found, [data[:5_000], data[5_000:]])
    assert not matches(found, [data[:5_000], data[5_000:-1] + b"x"])


@pytest.mark.parametrize("unknown", ["md5:00", "xxh3*:00", "xxh3*0:00", "xxh3*x:00", "md5*4:00"])
def test_a_digest_of_another_kind_matches_nothing(unknown: str, data: bytes) -> None:
    assert not matches(unknown, [data])


def test_nothing_is_read_for_no_checksum(data: bytes) -> None:
    assert digest(NO_CHECKSUM, [data], threads=4) == ""
    assert matches("", [data])


@given(ranks=st.integers(1, 64), cores=st.integers(1, 256))
def test_ranks_do_not_take_more_cores_than_there_are(ranks: int, cores: int) -> None:
    beside, alone = (threads_of_a_rank(ranks, beside_training=beside, cores=cores) for beside in (True, False))
    assert 1 <= beside <= alone <= MOST_THREADS
    assert alone == 1 or ranks * alone <= cores
    assert beside == 1 or 2 * ranks * beside <= cores
