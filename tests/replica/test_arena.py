"""Arenas: ownership, contents, adoption and removal."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.protocol.versions import SlotState, Version
from lightning_ckptless.replica.arena import Arena, Hold, Owner, adopt, default_arena_dir, find_arenas, reclaim
from lightning_ckptless.replica.arena_cleanup import find_abandoned_arenas
from lightning_ckptless.replica.arena_metadata import locked
from lightning_ckptless.replica.arena_notes import ArenaNotes, write_notes
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.slot import HEADER_BYTES, Slot
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.system.memory_files import make_memory_file
from tests.mounts import small_memory
from tests.outsider import call_as_another_user, needs_another_user, open_to_all


@pytest.fixture
def dead() -> Owner:
    """A process that has exited."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    exited = Owner.of(child.pid)
    assert exited.alive()
    child.communicate()
    return exited


@pytest.fixture
def written(arena: Arena, stamp: Stamp) -> Arena:
    """An arena with one committed replica of 1000 bytes."""
    slot, _ = arena.slots(0, 1, 1000, layout=stamp.layout)
    write(slot, stamp, torch.arange(1000).to(torch.uint8), b"host state")
    slot.commit()
    return arena


def test_a_folder_without_metadata_is_removed_after_an_error(tmp_path: Path) -> None:
    origin: Any = object()
    with pytest.raises(TypeError):
        Arena.create(tmp_path, "run", "node", Owner.of(os.getpid()), origin=origin)
    assert list(tmp_path.iterdir()) == []


def write(slot: Slot, stamp: Stamp, bulk: torch.Tensor, blob: bytes, algorithm: str = "xxh3") -> None:
    slot.begin(stamp)
    slot.bulk.copy_(bulk)
    slot.seal(stamp, blob, digest(algorithm, (bytes_of(slot.bulk), blob)))


# ------------------------------------------------------------------ what it holds


def test_a_replica_is_read_as_it_was_written(written: Arena, stamp: Stamp) -> None:
    (replica,) = written.inventory()
    assert replica.snapshot == stamp.snapshot and replica.state is SlotState.COMMITTED
    assert (replica.shard, replica.holder, replica.node, replica.slot) == (0, 1, "node0", 0)
    assert written.verify(replica)
    assert torch.equal(written.read_bulk(replica), torch.arange(1000).to(torch.uint8))
    assert written.read_blob(replica) == b"host state"


@pytest.mark.parametrize("algorithm", ["xxh3", "crc32"])
@pytest.mark.parametrize("place", [HEADER_BYTES, HEADER_BYTES + 999, HEADER_BYTES + 1000, HEADER_BYTES + 1009])
def test_a_flipped_byte_is_detected(arena: Arena, stamp: Stamp, place: int, algorithm: str) -> None:
    slot, _ = arena.slots(0, 1, 1000, layout=stamp.layout)
    write(slot, stamp, torch.arange(1000).to(torch.uint8), b"host state", algorithm)
    (replica,) = arena.inventory()
    assert arena.verify(replica)
    with slot.path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    assert not arena.verify(replica)


def test_without_a_checksum_nothing_is_checked(arena: Arena, stamp: Stamp) -> None:
    slot, _ = arena.slots(0, 1, 10, layout=stamp.layout)
    write(slot, stamp, torch.zeros(10, dtype=torch.uint8), b"", "none")
    assert arena.verify(arena.inventory()[0])


def test_an_unknown_checksum_does_not_match(written: Arena) -> None:
    assert not written.verify(replace(written.inventory()[0], checksum="md9:00"))


def test_writing_into_a_read_tensor_does_not_change_the_slot(written: Arena) -> None:
    (replica,) = written.inventory()
    written.read_bulk(replica).zero_()
    assert written.verify(replica)


def test_a_torn_header_is_skipped_and_counted(written: Arena, stamp: Stamp) -> None:
    slot, _ = written.slots(1, 1, 1000, layout=stamp.layout)
    slot.begin(replace(stamp, shard=1))
    os.pwrite(slot._fd, b"\xff", 40)
    assert [replica.shard for replica in written.inventory()] == [0]
    assert written.torn_headers == 1


def test_a_truncated_file_is_skipped(written: Arena) -> None:
    (replica,) = written.inventory()
    path = next(written.path.glob("shard-*.slot-0"))
    os.truncate(path, HEADER_BYTES + replica.bulk_bytes)
    assert written.inventory() == ()


def test_the_slots_of_another_run_are_skipped(written: Arena, tmp_path: Path, owner: Owner) -> None:
    other = Arena.create(tmp_path, "other", "node0", owner)
    for path in written.path.glob("shard-*"):
        (other.path / path.name).write_bytes(path.read_bytes())
    assert other.inventory() == ()


def test_a_slot_is_reopened_with_its_contents(written: Arena, stamp: Stamp) -> None:
    written.close()
    again = Arena.attach(written.path)
    slot, _ = again.slots(0, 1, 1000, layout=stamp.layout)
    assert slot.header is not None and slot.header.stamp == stamp
    assert torch.equal(slot.bulk, torch.arange(1000).to(torch.uint8))
    again.close()


def test_another_layout_gets_slots_of_its_own(written: Arena, stamp: Stamp) -> None:
    slot, _ = written.slots(0, 1, 500, layout="cd" * 32)
    write(slot, replace(stamp, layout="cd" * 32), torch.zeros(500, dtype=torch.uint8), b"")
    assert {replica.layout for replica in written.inventory()} == {stamp.layout, "cd" * 32}
    assert all(written.verify(replica) for replica in written.inventory())


def test_slots_larger_than_the_free_space_are_refused_with_numbers(arena: Arena) -> None:
    disk = os.statvfs(arena.path)
    asked = disk.f_bavail * disk.f_frsize
    with pytest.raises(ArenaError, match=rf"{arena.path}.* need {2 * (asked + 4096)} more bytes.*arena_dir="):
        arena.slots(0, 0, asked)
    assert not list(arena.path.glob("shard-*"))


def test_layouts_are_kept(arena: Arena, state: dict[str, torch.Tensor]) -> None:
    layout = plan_layout([describe(state, replicated=True)] * 2)
    arena.write_layout(layout)
    again = arena.read_layout(layout.digest)
    assert again is not None and again.chunks == layout.chunks
    assert arena.read_layout("00") is None


def test_a_damaged_layout_is_none(arena: Arena, state: dict[str, torch.Tensor]) -> None:
    layout = plan_layout([describe(state, replicated=True)])
    arena.write_layout(layout)
    path = arena.path / f"layout-{layout.digest}.json"
    path.write_bytes(path.read_bytes().replace(b"weight", b"height"))
    assert arena.read_layout(layout.digest) is None
    path.write_bytes(b"{")
    assert arena.read_layout(layout.digest) is None


def test_clear_removes_slots_and_layouts(written: Arena, state: dict[str, torch.Tensor]) -> None:
    written.write_layout(plan_layout([describe(state, replicated=True)]))
    written.write_notes(ArenaNotes(generation=1))
    written.clear()
    assert written.inventory() == () and not list(written.path.glob("layout-*"))
    assert written.notes() == ArenaNotes(generation=1)


def test_prune_removes_other_slot_pairs(written: Arena, stamp: Stamp) -> None:
    write(
        written.slots(1, 1, 10, layout=stamp.layout)[0],
        replace(stamp, shard=1),
        torch.zeros(10, dtype=torch.uint8),
        b"",
    )
    written.prune({(1, 1)})
    assert [(replica.shard, replica.holder) for replica in written.inventory()] == [(1, 1)]


def test_retain_removes_what_a_committed_version_superseded(
    written: Arena, stamp: Stamp, state: dict[str, torch.Tensor]
) -> None:
    new = replace(stamp, layout="cd" * 32, generation=2)
    write(written.slots(0, 1, 10, layout=new.layout)[0], new, torch.zeros(10, dtype=torch.uint8), b"")
    past = replace(new, shard=5, generation=1)
    write(written.slots(5, 1, 10, layout=new.layout)[0], past, torch.zeros(10, dtype=torch.uint8), b"")
    old_layout = plan_layout([describe(state, replicated=True)])
    written.write_layout(old_layout)
    written.retain(new.layout, 2)
    assert [(replica.layout, replica.generation) for replica in written.inventory()] == [(new.layout, 2)]
    assert written.read_layout(old_layout.digest) is None
    assert len(list(written.path.glob("shard-*"))) == 2


# ------------------------------------------------------------------ whose it is


def test_only_its_user_may_read_an_arena(arena: Arena) -> None:
    assert arena.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in arena.path.iterdir()} == {0o600}


def test_creating_an_arena_again_attaches_to_it(written: Arena, tmp_path: Path, owner: Owner) -> None:
    assert len(Arena.create(tmp_path, "run", "node0", owner).inventory()) == 1


def test_many_ranks_may_create_the_same_arena_concurrently(tmp_path: Path, owner: Owner) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Arena.create(tmp_path, "run", "n", owner, origin="a.ckpt"), range(8)))
    assert {arena.path for arena in made} == {made[0].path} and made[0].notes() == ArenaNotes(origin="a.ckpt")


def test_an_arena_of_a_live_process_is_not_taken(tmp_path: Path, owner: Owner) -> None:
    Arena.create(tmp_path, "run", "n", Owner.of(os.getppid()))
    with pytest.raises(ArenaError, match=f"live process {os.getppid()}, not to {owner.pid}"):
        Arena.create(tmp_path, "run", "n", owner)


def test_an_arena_of_a_dead_process_gets_the_new_owner(tmp_path: Path, owner: Owner, dead: Owner) -> None:
    Arena.create(tmp_path, "run", "n", dead)
    Arena.create(tmp_path, "run", "n", owner)
    assert find_arenas(tmp_path)[0].owner == owner


@pytest.mark.parametrize("name", ["a/b", "../up", "a b", "ä", "-"])
def test_any_run_id_maps_to_one_folder(tmp_path: Path, owner: Owner, name: str) -> None:
    made = Arena.create(tmp_path, name, name, owner)
    assert made.path.parent == tmp_path and find_arenas(tmp_path, name)[0].node == name


def test_another_format_is_refused(arena: Arena) -> None:
    facts = json.loads((arena.path / "arena.json").read_bytes())
    (arena.path / "arena.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ArenaError, match="arena format 99, expected 3"):
        Arena.attach(arena.path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 1}', b"\xff"])
def test_a_folder_that_is_not_an_arena_is_refused(arena: Arena, content: bytes) -> None:
    (arena.path / "arena.json").write_bytes(content)
    with pytest.raises(ArenaError):
        Arena.attach(arena.path)
    assert find_arenas(arena.path.parent) == ()


def spoil(arena: Arena, **owner: object) -> None:
    """Damage the metadata of an arena, including its owner."""
    path = arena.path / "arena.json"
    facts = json.loads(path.read_bytes())
    path.write_text(json.dumps(facts | {"owner": facts["owner"] | owner, "created_at": 1.0}))


@pytest.mark.parametrize("pid", [-7, 0, 1 << 40, "x", None])
def test_a_damaged_arena_does_not_prevent_a_start_of_its_own_or_another_run(
    written: Arena, tmp_path: Path, owner: Owner, pid: object, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(written, pid=pid)
    assert find_arenas(tmp_path) == () and reclaim(tmp_path, now=time.time() + 1e6, keep_s=0) == ()
    Arena.create(tmp_path, "other", "node0", owner)
    again = Arena.create(tmp_path, "run", "node0", owner)
    assert again.path == written.path and again.inventory() == ()
    assert caplog.text.count("it is cleared and reused") == 1


def test_a_damaged_arena_of_a_live_process_is_not_taken_from_it(
    written: Arena, tmp_path: Path, owner: Owner, dead: Owner
) -> None:
    spoil(written)
    with pytest.raises(ArenaError, match=f"after process {owner.pid} has exited"):
        Arena.create(tmp_path, "run", "node0", dead)
    assert any(written.path.glob("shard-*"))


def test_an_arena_of_another_user_is_refused(arena: Arena) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(arena.path, 12345, -1)
    with pytest.raises(ArenaError, match="found one of user 12345"):
        Arena.attach(arena.path)


def test_a_symbolic_link_is_not_an_arena(arena: Arena, tmp_path: Path) -> None:
    link = tmp_path / "ckptless-link"
    link.symlink_to(arena.path)
    with pytest.raises(ArenaError):
        Arena.attach(link)


def test_the_error_for_a_folder_that_cannot_be_created_shows_the_fix(tmp_path: Path, owner: Owner) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArenaError, match="arena_dir="):
        Arena.create(tmp_path / "file", "run", "n", owner)


# ------------------------------------------------------------------ what becomes of it


def test_arenas_are_found_with_their_metadata(written: Arena, tmp_path: Path, owner: Owner, dead: Owner) -> None:
    Arena.create(tmp_path, "other", "node1", dead, origin="last.ckpt")
    first, second = find_arenas(tmp_path)
    assert (first.run_id, first.node, first.owner_alive) == ("other", "node1", False) and first.origin == "last.ckpt"
    assert (second.run_id, second.owner, second.owner_alive) == ("run", owner, True)
    assert second.bytes >= 2 * HEADER_BYTES and second.created_at <= time.time()
    assert find_arenas(tmp_path, "run") == (second,)
    assert find_arenas(tmp_path / "nowhere") == ()


def test_a_zombie_owner_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    owner = Owner.of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not owner.alive()
    child.communicate()


def test_a_process_with_a_reused_id_is_another_owner(owner: Owner) -> None:
    assert not replace(owner, started_at=owner.started_at - 60).alive()


def test_an_abandoned_arena_is_adopted_with_its_contents(
    tmp_path: Path, owner: Owner, dead: Owner, stamp: Stamp
) -> None:
    orphan = Arena.create(tmp_path, "run", "old", dead)
    write(orphan.slots(0, 1, 10, layout=stamp.layout)[0], stamp, torch.ones(10, dtype=torch.uint8), b"b")
    orphan.close()
    adopted = adopt(find_arenas(tmp_path)[0], node="new", owner=owner)
    assert adopted is not None and adopted.node == "new" and not orphan.path.exists()
    (replica,) = adopted.inventory()
    assert replica.node == "new" and adopted.verify(replica)
    assert find_arenas(tmp_path)[0].owner == owner


def test_only_one_of_many_concurrent_adoptions_succeeds(tmp_path: Path, owner: Owner, dead: Owner) -> None:
    Arena.create(tmp_path, "run", "old", dead)
    (info,) = find_arenas(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: adopt(info, node=f"new{i}", owner=owner), range(8)))
    assert len([arena for arena in won if arena is not None]) == 1
    assert len(find_arenas(tmp_path)) == 1


def test_an_arena_with_a_live_owner_is_not_adopted(arena: Arena, tmp_path: Path, owner: Owner) -> None:
    assert adopt(find_arenas(tmp_path)[0], node="new", owner=owner) is None


def test_a_node_with_an_arena_does_not_adopt_another(arena: Arena, tmp_path: Path, owner: Owner, dead: Owner) -> None:
    Arena.create(tmp_path, "run", "old", dead)
    orphan = next(info for info in find_arenas(tmp_path) if info.node == "old")
    assert adopt(orphan, node="node0", owner=owner) is None
    assert len(find_arenas(tmp_path)) == 2


def test_reclaim_removes_only_old_abandoned_arenas(arena: Arena, tmp_path: Path, dead: Owner) -> None:
    orphan = Arena.create(tmp_path, "run", "old", dead)
    now = time.time()
    assert reclaim(tmp_path, now=now + 50, keep_s=60) == ()
    assert reclaim(tmp_path, now=now + 100, keep_s=60) == (orphan.path,)
    assert [info.node for info in find_arenas(tmp_path)] == ["node0"]


def test_remove_deletes_everything(written: Arena) -> None:
    written.remove()
    assert not written.path.exists()


def test_the_default_folder_is_writable(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CKPTLESS_ARENA_DIR")
    assert os.access(default_arena_dir(), os.W_OK)
    monkeypatch.setenv("CKPTLESS_ARENA_DIR", str(tmp_path))
    assert default_arena_dir() == tmp_path


def test_without_shared_memory_a_temporary_folder_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CKPTLESS_ARENA_DIR")
    monkeypatch.setattr("lightning_ckptless.replica.arena_space.SHARED_MEMORY", tmp_path / "none")
    with pytest.warns(UserWarning, match="arenas are stored in"):
        assert os.access(default_arena_dir(), os.W_OK)


def test_a_new_version_may_follow_in_a_slot(written: Arena, stamp: Stamp) -> None:
    (replica,) = written.inventory()
    slot, _ = written.slots(0, 1, 1000, layout=stamp.layout)
    later = replace(stamp, version=Version(5, True))
    write(slot, later, torch.ones(1000, dtype=torch.uint8), b"longer host state than before")
    (after,) = written.inventory()
    assert after.version == Version(5, True) and written.verify(after) and not written.verify(replica)


# ------------------------------------------------------------------ other users, and other jobs


@needs_another_user
@pytest.mark.parametrize("planted", ["folder", "link"])
def test_a_folder_or_link_of_another_user_is_neither_locked_nor_written(
    planted: str, tmp_path: Path, owner: Owner
) -> None:
    shared, own = open_to_all(tmp_path / "shm"), tmp_path / "own"
    own.mkdir(mode=0o700)
    path = shared / "ckptless-run-node"

    def plant() -> None:
        path.symlink_to(own) if planted == "link" else path.mkdir(mode=0o777)

    call_as_another_user(plant)
    with pytest.raises(ArenaError, match=r"symbolic link|found one of user 65534") as caught:
        Arena.create(shared, "run", "node", owner)
    assert "set arena_dir=" in str(caught.value)
    assert list(own.iterdir()) == [] and list(path.iterdir()) == []
    assert find_arenas(shared) == () and reclaim(shared, now=time.time() + 1e6, keep_s=0) == ()


@needs_another_user
def test_the_lock_of_another_users_folder_is_not_awaited(tmp_path: Path, owner: Owner) -> None:
    shared = open_to_all(tmp_path / "shm")
    path = shared / "ckptless-run-node"
    call_as_another_user(lambda: path.mkdir(mode=0o777))
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(ArenaError, match="65534"):
            Arena.create(shared, "run", "node", owner)
    finally:
        os.close(handle)


def test_an_arena_that_others_may_write_to_is_refused(arena: Arena) -> None:
    arena.path.chmod(0o770)
    with pytest.raises(ArenaError, match=r"found mode 0770.*chmod go-w"):
        Arena.attach(arena.path)
    assert find_arenas(arena.path.parent) == ()


def test_a_small_file_is_not_written_through_a_link(arena: Arena, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(arena.path)
    with pytest.raises(ArenaError):
        write_notes(link, ArenaNotes(generation=1))
    assert arena.notes() == ArenaNotes()


def test_an_arena_that_is_reclaimed_concurrently_is_created_again(tmp_path: Path, owner: Owner, dead: Owner) -> None:
    orphan = Arena.create(tmp_path, "run", "node", dead)
    with ThreadPoolExecutor(1) as pool:
        with locked(orphan.path, wait=True):
            made = pool.submit(Arena.create, tmp_path, "run", "node", owner)
            while not waits_for_lock(orphan.path):
                threading.Event().wait(0.01)
            orphan.remove()
        assert made.result(timeout=20).path.exists()
    (info,) = find_arenas(tmp_path)
    assert info.owner == owner


def waits_for_lock(path: Path) -> bool:
    """Whether a process waits for the lock of a file."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_arenas_may_be_removed_during_a_search(tmp_path: Path, owner: Owner, dead: Owner) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            arena = Arena.create(tmp_path, "run", "comes-and-goes", dead)
            arena.write_notes(ArenaNotes(generation=1))
            arena.remove()

    Arena.create(tmp_path, "run", "stays", owner)
    with ThreadPoolExecutor(2) as pool:
        job = pool.submit(come_and_go)
        try:
            for _ in range(200):
                assert "stays" in {info.node for info in find_arenas(tmp_path)}
                reclaim(tmp_path, now=time.time(), keep_s=1e6)
                find_abandoned_arenas(tmp_path, None)
        finally:
            over.set()
        job.result(timeout=20)


# ------------------------------------------------------------------ space


def test_the_slots_of_all_ranks_of_a_node_must_fit_together(arena: Arena) -> None:
    disk = os.statvfs(arena.path)
    each = disk.f_bavail * disk.f_frsize * 2 // 5
    state = {"weight": torch.empty(each, dtype=torch.uint8, device="meta")}
    layout = plan_layout([describe(state, replicated=False)] * 2)
    arena.require_space_for([(0, 0)], layout)
    with pytest.raises(ArenaError, match=r"4 slots need \d+ more bytes, but \d+ are free.*arena_dir="):
        arena.require_space_for([(0, 0), (1, 1)], layout)


def _hold_here(handles: list[int]) -> Hold:
    """Slots of anonymous memory, held by this process."""
    return lambda paths, _reason: handles.extend(make_memory_file(path) for path in paths)


def test_slots_that_do_not_fit_are_put_into_memory_and_used_like_files(
    tmp_path: Path, owner: Owner, stamp: Stamp
) -> None:
    handles: list[int] = []
    with small_memory(tmp_path / "small", 1) as folder:
        arena = Arena.create(folder, "run", "node0", owner)
        arena.hold = _hold_here(handles)
        slot, _ = arena.slots(0, 1, 900_000, layout=stamp.layout)
        write(slot, stamp, torch.ones(900_000, dtype=torch.uint8), b"small")
        (replica,) = Arena.attach(arena.path).inventory()
        assert arena.verify(replica) and arena.read_blob(replica) == b"small"
        assert len(handles) == 2 and find_arenas(folder)[0].bytes > 1_800_000
        again = Arena.attach(arena.path)
        assert again.slots(0, 1, 900_000, layout=stamp.layout)[0].header == slot.header, "found again, not made again"
        again.close()
        # Another slot would fit, but not the host state of all others.
        arena.slots(1, 1, 10_000, layout=stamp.layout)
        assert len(handles) == 4
        arena.close()
        for handle in handles:
            os.close(handle)
        assert arena.inventory() == () and arena.links_to_memory
        slot, _ = arena.slots(0, 1, 10_000, layout=stamp.layout)
        assert slot.header is None and not slot.path.is_symlink(), (
            "of the memory of an agent that has ended nothing is left"
        )
        arena.remove()


def test_a_decision_for_the_node_applies_to_each_of_its_ranks(tmp_path: Path, owner: Owner) -> None:
    handles: list[int] = []
    state = {"weight": torch.empty(700_000, dtype=torch.uint8, device="meta")}
    layout = plan_layout([describe(state, replicated=False)] * 2)
    with small_memory(tmp_path / "small", 2) as folder:
        arena = Arena.create(folder, "run", "node0", owner)
        arena.hold = _hold_here(handles)
        arena.require_space_for([(0, 0), (1, 1)], layout)
        arena.slots(0, 0, layout.bulk_bytes(0), layout=layout.digest)
        assert len(handles) == 2
        arena.close()
        for handle in handles:
            os.close(handle)


def test_slots_that_fit_nowhere_are_refused_with_all_remedies(tmp_path: Path, arena: Arena, owner: Owner) -> None:
    with small_memory(tmp_path / "small", 1) as folder:
        small = Arena.create(folder, "run", "node0", owner)
        ways = r"cannot hold them in anonymous memory: {}.*--shm-size.*arena_dir="
        with pytest.raises(ArenaError, match=ways.format("the workers were not started by an agent of this package")):
            small.slots(0, 0, 2_000_000)
        small.hold = _hold_here([])
        with pytest.raises(ArenaError, match=ways.format(r"only \d+ bytes of memory are available")):
            small.slots(0, 0, 1 << 50)
        assert not list(small.path.glob("shard-*"))


@needs_another_user
def test_the_temporary_folder_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = open_to_all(tmp_path / "tmp")
    monkeypatch.delenv("CKPTLESS_ARENA_DIR", raising=False)
    monkeypatch.setattr("lightning_ckptless.replica.arena_space.SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    planted = shared / f"ckptless-arenas-{os.getuid()}"

    def plant() -> None:
        planted.mkdir()
        planted.chmod(0o777)

    call_as_another_user(plant)
    with pytest.raises(ArenaError, match=r"found one of user 65534.*arena_dir="):
        default_arena_dir()
