"""Host state that leaves the memory of this machine, and comes back: what it may hold.

A host state is a pickle. As long as it stays in an arena in memory, whose folder is this user's alone, it is what
processes of this run have written there, and may hold whatever they hold. On a disk, or on its way between machines,
others might write it. What comes from there is admitted only if it is plain data, and classes that the user trusts by
name. So that a recovery does not find out, the same is asked of what leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from lightning_ckptless.errors import ArenaError, OptionsError
from lightning_ckptless.formats.packing import KINDS, pack, unpack
from lightning_ckptless.formats.pickles import Packed, UntrustedError, admit
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.replica.arena_space import is_in_memory
from lightning_ckptless.replica.restore import Fetched
from lightning_ckptless.trainer.session.member_set import MemberSet


class Departure:
    """What the small states of one rank may hold, beside what a process can.

    Args:
        options: the user's settings.
        members: the ranks, and where their arenas are.
    """

    def __init__(self, options: CkptlessOptions, members: MemberSet) -> None:
        self._rank = members.rank
        self._trusted = frozenset(options.trusted_classes)
        self.where = _where(options, members)
        self._kinds = 0

    def checked(self, packed: Packed | Callable[[], Packed]) -> Packed | Callable[[], Packed]:
        """A host state that may leave.

        Args:
            packed: the state, or what gives it later.

        Raises:
            OptionsError: it holds something that could not be read where it goes. Where it is given later, then.
        """
        if not self.where or self._kinds == (kinds := len(KINDS)):
            return packed
        self._kinds = kinds
        return self._admitted(packed) if isinstance(packed, Packed) else lambda: self._admitted(packed())

    def may_leave(self, packed: Packed) -> bool:
        """Whether a part of a host state could be read where it goes."""
        if not self.where:
            return True
        try:
            admit(packed, self._trusted)
        except UntrustedError:
            return False
        return True

    def _admitted(self, packed: Packed) -> Packed:
        try:
            return admit(packed, self._trusted)
        except UntrustedError as error:
            place = ".".join(place_of(unpack(packed), self._trusted))
            raise OptionsError(
                f"rank {self._rank}: {place}: {error}, and {self.where}. Keep plain data there (numbers, text, lists, "
                f"arrays, tensors), or trust it by name: trusted_classes=[{error.name!r}]"
            ) from error


def _where(options: CkptlessOptions, members: MemberSet) -> str:
    """Where small states go beside the memory of this machine, in words; empty where they stay there."""
    if options.durable_every_n_steps is not None or options.durable_every_s is not None:
        return "durable states of it are written"
    if len(set(members.nodes)) > 1:
        return "other machines keep copies of it"
    return "" if is_in_memory(members.arena.path) else f"its arena is on a disk, in {members.arena.path.parent}"


def place_of(value: Any, trusted: Collection[str]) -> Iterator[str]:
    """The steps to the first part of a value that may not leave.

    Args:
        value: the value.
        trusted: dotted names that are opted in.
    """
    for name, part in _parts(value):
        try:
            admit(pack(part), trusted)
        except UntrustedError:
            yield name
            yield from place_of(part, trusted)
            return


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield str(key), part
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield str(index), part


def small_state_of(shard: int, fetched: Fetched, members: MemberSet) -> Any:
    """The host state of a rank, as it was fetched.

    Args:
        shard: the rank that wrote it.
        fetched: what was brought here.
        members: the ranks of now.

    Raises:
        OptionsError: it has come from elsewhere, and holds something that is not trusted.
        ArenaError: it is damaged.
    """
    data = fetched.blobs[shard]
    if shard not in fetched.received and is_in_memory(members.arena.path):
        return unpack(Packed(data))
    try:
        return unpack(admit(data, members.trusted))
    except UntrustedError as error:
        where = f"rank {members.rank}: the host state of rank {shard}"
        if not error.name:
            raise ArenaError(f"{where}: {error}") from error
        raise OptionsError(f"{where}: {error}{how_to_trust(error)}") from error


def how_to_trust(error: UntrustedError) -> str:
    """What to do about a class in a state from elsewhere, as the end of a message; empty for a damaged state."""
    return f". If your program keeps it there, name it: trusted_classes=[{error.name!r}]" if error.name else ""
