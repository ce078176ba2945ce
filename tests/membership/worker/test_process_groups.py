"""The configuration of a process before it creates its first group."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.errors import TransportError
from lightning_ckptless.membership.worker.process_groups import World, keep_through_device_errors

NAMES = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ENABLE_MONITORING",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
)


def test_nccl_leaves_the_process_alive_unless_the_user_configures_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        # So that each is put back, whatever it was.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    keep_through_device_errors()
    assert [os.environ[name] for name in NAMES] == ["0", "0", "1", "0", "0"]


@pytest.mark.parametrize("chosen", [None, "0"])
def test_the_environment_is_as_before_once_a_group_has_been_created(
    chosen: str | None, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "GLOO_ENABLE_STORE_V2_API", "GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER"
    for name in (first, second):
        monkeypatch.setenv(name, chosen or "")
        if name != first or chosen is None:
            monkeypatch.delenv(name)
    before, world = dict(os.environ), World()
    with world.making():
        dist.new_group(backend="gloo")
        assert (os.environ[first], os.environ[second]) == (chosen or "1", "1")
    assert dict(os.environ) == before


class Counted:
    """A wait that counts how often it was aborted."""

    aborted = 0

    def abort(self) -> None:
        """See `Wait.abort`."""
        self.aborted += 1


def test_waits_are_aborted_with_the_groups_of_their_generation() -> None:
    world, wait = World(), Counted()
    world.abort_with_groups(wait)
    world.abort()
    world.abort()
    assert wait.aborted == 2
    world.leave()
    assert wait.aborted == 3
    # The next generation has waits of its own.
    world.abort()
    assert wait.aborted == 3


@pytest.fixture
def store() -> Iterator[Store]:
    """The store of a default group with one rank."""
    found = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=found, rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


def test_a_text_is_passed_from_one_rank_to_others(store: Store) -> None:
    giver, taker = World(), World()
    for text in ("one", "two"):
        assert giver.share("name", text) == text
        assert giver.share("other name", f"other {text}") == f"other {text}"
        assert [taker.share(name, "") for name in ("name", "other name")] == [text, f"other {text}"]


def test_a_wait_for_a_text_ends_with_the_next_fault(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    world, looks = World(), iter([False, True])
    monkeypatch.setattr(world, "_is_over", lambda: next(looks))
    with pytest.raises(TransportError, match="another fault was reported while the ranks were regrouping"):
        world.share("name", "")


def test_only_few_messages_use_the_group_of_the_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    assert world.host_group(60.0, may_be_of_training=True) is dist.group.WORLD
    assert world.host_group(60.0) is not dist.group.WORLD
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    assert world.host_group(60.0, may_be_of_training=True) is not dist.group.WORLD


@pytest.mark.parametrize(("local", "expected"), [("1", True), ("2", False), (None, False)])
def test_ranks_are_on_one_node_if_one_agent_has_started_them(
    local: str | None, *, expected: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert World().is_on_one_node == expected
