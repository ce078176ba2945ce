"""Restricts what host state may contain when it leaves this node's memory and when it comes back.

A host state is a pickle. While it stays in an in-memory arena, whose folder only this user can access, only processes
of this run can have written it, and it may contain anything. On a disk or on the network, someone else could have
written it. State from there is accepted only if it consists of plain data and of classes that the user trusts by name.
Outgoing state is checked the same way, so that a problem is found before a recovery needs the state.
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


class OutgoingCheck:
    """Checks the host states of one rank before they leave this node's memory.

    Args:
        options: the user's settings.
        members: the ranks and their arenas.
    """

    def __init__(self, options: CkptlessOptions, members: MemberSet) -> None:
        self._rank = members.rank
        self._trusted = frozenset(options.trusted_classes)
        self.where = _where(options, members)
        self._kinds = 0

    def checked(self, packed: Packed | Callable[[], Packed]) -> Packed | Callable[[], Packed]:
        """Return a host state once it is known to be readable at its destination.

        Args:
            packed: the state, or a function that returns it later.

        Raises:
            OptionsError: it contains something that its destination would not accept. For a function, the returned
                function raises.
        """
        if not self.where or self._kinds == (kinds := len(KINDS)):
            return packed
        self._kinds = kinds
        return self._admitted(packed) if isinstance(packed, Packed) else lambda: self._admitted(packed())

    def may_leave(self, packed: Packed) -> bool:
        """Return whether a part of a host state could be read at its destination."""
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
                f"arrays, tensors), or trust the class by name: trusted_classes=[{error.name!r}]"
            ) from error


def _where(options: CkptlessOptions, members: MemberSet) -> str:
    """Return where host states go other than this node's memory, for a message; empty if they stay in memory."""
    if options.durable_every_n_steps is not None or options.durable_every_s is not None:
        return "the host state is written to durable states"
    if len(set(members.nodes)) > 1:
        return "other nodes hold replicas of the host state"
    return "" if is_in_memory(members.arena.path) else f"the arena is on a disk, in {members.arena.path.parent}"


def place_of(value: Any, trusted: Collection[str]) -> Iterator[str]:
    """Yield the path to the first part of a value that may not leave, one key at a time.

    Args:
        value: the value.
        trusted: dotted names of trusted classes.
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


def host_state_of(shard: int, fetched: Fetched, members: MemberSet) -> Any:
    """Return the host state of a rank from what was fetched.

    Args:
        shard: the rank that wrote it.
        fetched: the fetched shards.
        members: the current ranks.

    Raises:
        OptionsError: it came from outside this node's memory and contains an untrusted class.
        ArenaError: it is corrupt.
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
    """Return advice about an untrusted class, as the end of a message; empty for a corrupt state."""
    return f". If your script stores it there, trust it by name: trusted_classes=[{error.name!r}]" if error.name else ""
