"""When a durable state is due, which ones are kept, and how they are named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.durable_schedule import (
    Share,
    Timetable,
    share_of,
    state_name,
    states_to_drop,
    version_of,
)
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Version

versions = st.builds(Version, st.integers(0, 60), st.booleans())


@given(versions)
def test_a_name_is_parsed_back(version: Version) -> None:
    assert version_of(state_name(version)) == version
    assert version_of(f".{state_name(version)}.part") is None


@given(st.sets(versions, min_size=2, max_size=9))
def test_names_sort_by_step(found: set[Version]) -> None:
    by_name = [version.optimizer_step for version in sorted(found, key=state_name)]
    assert by_name == sorted(by_name)


@given(versions, versions, st.integers(1, 20))
def test_by_steps_a_state_is_due_after_a_multiple(newest: Version, last: Version, n: int) -> None:
    due = Timetable(every_n_steps=n).is_due(newest, last, since_s=1e9)
    passed = any(step % n == 0 for step in range(last.optimizer_step + 1, newest.optimizer_step + 1))
    assert due == (passed and newest > last)


@given(versions, versions, st.floats(0.1, 100), st.floats(0, 200))
def test_by_time_a_state_is_due_if_there_is_a_newer_version(
    newest: Version, last: Version, every_s: float, since_s: float
) -> None:
    due = Timetable(every_s=every_s).is_due(newest, last, since_s=since_s)
    assert due == (newest > last and since_s >= every_s)


def test_with_both_intervals_the_first_one_decides() -> None:
    both = Timetable(every_n_steps=10, every_s=60.0)
    assert both.is_due(Version(10, True), Version(1, True), since_s=1.0)
    assert both.is_due(Version(2, True), Version(1, True), since_s=61.0)
    assert not both.is_due(Version(9, True), Version(1, True), since_s=59.0)


def test_without_an_interval_nothing_is_due() -> None:
    assert not Timetable().is_on
    assert not Timetable().is_due(Version(1000, True), Version(0, True), since_s=1e9)


@given(st.sets(versions, max_size=12), versions, st.integers(1, 4))
def test_the_newest_states_are_kept(kept: set[Version], written: Version, keep: int) -> None:
    kept |= {written}
    left = kept - set(states_to_drop(kept, written, keep))
    assert written in left
    assert max(left) == written
    steps = [version.optimizer_step for version in left]
    assert len(steps) == len(set(steps)) <= keep
    passed = {version.optimizer_step for version in kept if version <= written}
    assert set(steps) == set(sorted(passed)[-keep:])


def test_states_newer_than_the_written_one_are_deleted() -> None:
    kept = {Version(10, True), Version(20, True), Version(30, True), Version(40, True)}
    assert states_to_drop(kept, Version(20, True), 2) == (Version(30, True), Version(40, True))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 4))
def test_every_shard_is_written_by_exactly_one_node_that_has_it(sizes: list[int], copies: int) -> None:
    nodes = [f"n{number}" for number, size in enumerate(sizes) for _ in range(size)]
    placement = place(nodes, min(copies, len(sizes) - 1))
    shares = {node: share_of(node, placement.holders, nodes, 10) for node in dict.fromkeys(nodes)}
    assert sorted(shard for share in shares.values() for shard in share.shards) == list(range(len(nodes)))
    for node, share in shares.items():
        assert all(node in {nodes[rank] for rank in (s, *placement.holders[s])} for s in share.shards)
    assert [node for node, share in shares.items() if share.leads] == ["n0"]
    # A single writer needs no agreement.
    first = shares["n0"]
    assert first.is_whole == (len(sizes) == min(copies, len(sizes) - 1) + 1)


def test_several_writers_write_at_multiples_of_the_interval() -> None:
    share = Share((0,), of=4, leads=True, every_n_steps=5)
    assert [step for step in range(1, 12) if share.is_due(Version(step, True))] == [5, 10]
    assert not share.is_due(Version(5, False))
    assert not Share((0,), of=4, leads=True).is_due(Version(5, True))
