"""The header of a slot: intact, torn, of another format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import ArenaError, ProtocolError
from lightning_ckptless.formats.schema import MOST_RANKS
from lightning_ckptless.protocol.versions import SlotState, Version
from lightning_ckptless.replica.slot import HEADER_BYTES, Slot, SlotHeader, SlotName
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.limits import files_at_most

numbers = st.integers(0, 2**40)
names = st.text(min_size=0, max_size=40)
stamps = st.builds(
    Stamp,
    st.builds(Version, numbers, st.booleans()),
    numbers,
    st.integers(1000, MOST_RANKS),
    st.text("0123abcdef", max_size=64),
    st.integers(0, 999),
    st.integers(0, MOST_RANKS - 1),
)
headers = st.builds(
    SlotHeader,
    names,
    stamps,
    st.sampled_from(SlotState),
    numbers,
    numbers,
    st.just("") | st.text("0123abcdef:", max_size=40),
)


@given(headers)
def test_a_header_is_decoded_from_its_page(header: SlotHeader) -> None:
    page = header.encode()
    assert len(page) == HEADER_BYTES
    assert SlotHeader.decode(page) == header


def test_a_header_torn_at_any_byte_is_rejected(stamp: Stamp) -> None:
    old = SlotHeader("run", replace(stamp, version=Version(1, True)), SlotState.COMMITTED, 1000, 50, "xxh3:00").encode()
    new = SlotHeader("run", stamp, SlotState.WRITING, 1000).encode()
    readable = {SlotHeader.decode(new[:cut] + old[cut:]) for cut in range(HEADER_BYTES + 1)}
    assert readable == {SlotHeader.decode(old), SlotHeader.decode(new), None}
    for cut in range(len(new.rstrip(b"\0"))):
        assert SlotHeader.decode(new[:cut]) is None


def test_every_flipped_byte_of_a_header_is_detected(stamp: Stamp) -> None:
    page = SlotHeader("run", stamp, SlotState.STAGED, 1000, 50, "xxh3:00").encode()
    for place in range(len(page.rstrip(b"\0"))):
        damaged = bytearray(page)
        damaged[place] ^= 0x10
        assert SlotHeader.decode(bytes(damaged)) is None


@given(
    st.builds(
        SlotName.of, st.integers(0, 9999), st.integers(0, 99999), st.text("0123abcdef", max_size=64), st.integers(0, 99)
    )
)
def test_a_name_is_parsed_from_its_file_name(name: SlotName) -> None:
    assert SlotName.parse(str(name)) == name


@pytest.mark.parametrize(
    "other", ["arena.json", "layout-ab.json", "shard-1.held-by-2.ab.slot-x", ".shard-1.held-by-2.ab.slot-1"]
)
def test_other_files_are_not_slots(other: str) -> None:
    assert SlotName.parse(other) is None


def test_the_states_of_a_slot_in_order(tmp_path: Path, stamp: Stamp) -> None:
    slot = Slot(tmp_path / "slot", "run", 100)
    assert slot.header is None and slot.bulk.tolist() == [0] * 100
    slot.begin(stamp)
    slot.bulk.fill_(7)
    slot.seal(stamp, b"blob", "xxh3:1")
    slot.commit()
    slot.close()
    again = Slot(tmp_path / "slot", "run", 100)
    assert again.header == SlotHeader("run", stamp, SlotState.COMMITTED, 100, 4, "xxh3:1")
    assert again.bulk.tolist() == [7] * 100
    again.close()


def test_an_event_that_the_table_forbids_is_a_bug(tmp_path: Path, stamp: Stamp) -> None:
    slot = Slot(tmp_path / "slot", "run", 10)
    with pytest.raises(ProtocolError, match="rank 1, shard 0, step 3: event seal in a slot in state empty"):
        slot.seal(stamp, b"", "")
    slot.begin(stamp)
    with pytest.raises(ProtocolError, match="event commit in a slot in state writing"):
        slot.commit()
    slot.close()


def test_only_its_owner_may_read_a_slot(tmp_path: Path) -> None:
    Slot(tmp_path / "slot", "run", 10).close()
    assert (tmp_path / "slot").stat().st_mode & 0o777 == 0o600


def test_a_slot_that_does_not_fit_is_an_error_instead_of_a_signal(tmp_path: Path) -> None:
    with files_at_most(8192), pytest.raises(ArenaError, match="cannot reserve a slot of 8193 bytes"):
        Slot(tmp_path / "slot", "run", 4097)


def test_a_blob_that_does_not_fit_leaves_the_slot_unsealed(tmp_path: Path, stamp: Stamp) -> None:
    with files_at_most(8192):
        slot = Slot(tmp_path / "slot", "run", 4000)
        slot.begin(stamp)
        with pytest.raises(ArenaError, match="cannot write"):
            slot.seal(stamp, bytes(1000), "")
    assert slot.view.state is SlotState.WRITING
    slot.close()


def test_a_slot_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="cannot reserve a slot of 4106 bytes"):
        Slot(tmp_path / "missing" / "slot", "run", 10)
