"""The mirror: stage, send, commit, once per version, in a thread of its own.

    training thread                     mirror thread
    submit: begin the own slot
            copy what forward changes
                                        stage   copy the rest of the own shard
    wait_staged, optimizer step         seal    checksum, header says `staged`
                                        send    header page to holders; bulk and blob follow
                                        agree   every rank has all it should have?
                                        commit  headers say `committed`, on all ranks or on none

A round that a rank cannot take part in (nothing submitted, or a copy torn by a write) is voted down: all ranks abort it
and keep the version before. Rounds run on a transport of their own, so they order against no collective of training.
"""

from __future__ import annotations

import faulthandler
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter

import torch

from lightning_ckptless.errors import TransportError, let_go
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.checksum import NO_CHECKSUM, bytes_of, digest, joined
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.mirror.coordinated_stop import Ending
from lightning_ckptless.replica.mirror.exchange import Delivery, Known, Shipment
from lightning_ckptless.replica.mirror.staging import Load, Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_pair import SlotPair
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Transport

Blob = bytes | Callable[[], bytes]
"""A rank's host state, or what gives it in the mirror's thread, where waiting for a device holds up nobody."""


@dataclass
class Round:
    """One version on its way. Without a load, this rank has nothing to give."""

    version: Version
    began_at: float
    slot: Slot | None = None
    load: Load | None = None
    blob: Blob = b""
    staged: Future[None] = field(default_factory=Future)
    ended: Future[None] = field(default_factory=Future)

    def pack(self) -> bytes:
        """The host state; packed when it is asked for first."""
        if not isinstance(self.blob, bytes):
            self.blob = self.blob()
        return self.blob

    def fail(self, error: BaseException) -> None:
        """Hand an error to whoever waits for the round."""
        for future in (self.staged, self.ended):
            if not future.done():
                future.set_exception(error)


@dataclass
class MirrorStats:
    """What a mirror has done so far.

    Attributes:
        rounds: versions begun, skipped ones included.
        committed: rounds that all ranks committed.
        skipped: rounds that this rank took part in without data.
        aborted: rounds that some rank voted down.
        torn: rounds in which a tensor changed while it was copied here.
        staged_bytes: bytes of tensors copied into own slots.
        sent_bytes: bytes of tensors and host state sent to holders.
        last_stage_s: time from `submit` until the last version was copied.
        last_round_s: time from `submit` until the last round ended.
        stall_s: time that the training thread has waited here, in all.
    """

    rounds: int = 0
    committed: int = 0
    skipped: int = 0
    aborted: int = 0
    torn: int = 0
    staged_bytes: int = 0
    sent_bytes: int = 0
    last_stage_s: float = 0.0
    last_round_s: float = 0.0
    stall_s: float = 0.0


log = logging.getLogger(__name__)

WHOLE, CARRY_ON, CHOSEN = 1, 2, 4
"""What a rank votes on in a round: it has all that it should have, nobody has asked it to end the run, it has a word on
the interval between versions, in the bits above."""
_WORD_AT = 3

REWRITE_ROUNDS = 200
"""After so many rounds what stands still is written and sent anew, into both slots."""


class Mirror:
    """Mirrors this rank's shard to its holders, and keeps the shards of its sources.

    All ranks submit or skip the same versions in the same order. What goes wrong in the thread is raised by the next
    call.

    Args:
        arena: the node's arena.
        layout: how the state is cut.
        placement: who keeps what.
        transport: used by this mirror alone while a round is under way.
        generation: number of the membership.
        checksum: `xxh3`, `crc32` or `none`.
        threads: that may read a version for its checksum at once.
        committed: version that the state was restored from; it is not overwritten until a newer one is committed.
        probe: called in the thread with a moment and the version: `stage` (half of the copying done), `send`, `agree`,
            `committed`.
        staging: `overlap`, or `blocking` to copy everything before `submit` returns.
        finish_asked: whether this rank was asked to end the run; the next round tells all, and they agree where.
        interval_word: this rank's word on the interval between versions; None while it has none.

    Attributes:
        committed: newest version that all ranks have committed.
        ending: where the run ends, when a rank was asked to end it.
        interval_after: version in whose round all ranks had a word on the interval, and the bits that all words have in
            common. All ranks know them when they have submitted the version behind it.
        stats: what was done so far.

    Raises:
        ArenaError: the slots do not fit.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        layout: Layout,
        placement: Placement,
        transport: Transport,
        generation: int,
        checksum: str = "xxh3",
        threads: int = 1,
        committed: Version | None = None,
        probe: Callable[[str, Version], None] | None = None,
        staging: str = "overlap",
        finish_asked: Callable[[], bool] = lambda: False,
        interval_word: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.committed = committed
        self.ending = Ending()
        self.interval_after: tuple[Version, int] | None = None
        self._interval_word = interval_word
        self._finish_asked = finish_asked
        self.stats = MirrorStats()
        self._arena = arena
        self._layout = layout
        self._transport = transport
        self._generation = generation
        self._checksum = checksum
        self._threads = threads
        self._probe = probe
        self._blocking = staging == "blocking"
        self._early: frozenset[str] = frozenset()
        self._rank = transport.rank
        self._slot_pairs = {shard: self._slot_pair(shard) for shard in (self._rank, *placement.sources(self._rank))}
        self._delivery = Delivery(transport, placement.holders[self._rank], self._slot_pairs)
        self._stager = Stager(layout, self._rank)
        self._queue: queue.SimpleQueue[Round | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Round | None = None
        self._submitted: Round | None = None
        self._failure: BaseException | None = None

    def _slot_pair(self, shard: int) -> SlotPair:
        bulk_bytes = self._layout.bulk_bytes(shard)
        return SlotPair(self._arena.slots(shard, self._rank, bulk_bytes, layout=self._layout.digest), self.committed)

    # ------------------------------------------------------------------ training thread

    @property
    def busy(self) -> bool:
        """Whether a round is under way: `submit` would wait for it."""
        return self._last is not None and not self._last.ended.done()

    def bind(self, early: Collection[str]) -> None:
        """Name tensors that every `submit` copies before it returns, beside its `blocking_names`."""
        self._early = frozenset(early)

    def submit(
        self,
        version: Version,
        tensors: Mapping[str, torch.Tensor],
        blob: Blob,
        *,
        blocking_names: Collection[str] = (),
    ) -> float:
        """Begin to mirror a version. The tensors must not change until `wait_staged` has returned, but for those named.

        Args:
            version: the version.
            tensors: this rank's live tensors by name.
            blob: this rank's host state.
            blocking_names: tensors that may change at once; they are copied before this returns.

        Returns:
            Seconds spent waiting for the round before.

        Raises:
            TransportError: a peer is gone.
        """
        stall_s = self._wait(self._last.ended if self._last is not None else None)
        assert self.committed is None or version > self.committed, f"{version} after {self.committed} was committed"
        slot = self._slot_pairs[self._rank].free()
        slot.begin(self._stamp(version, self._rank))
        began_at = perf_counter()
        early = tensors.keys() if self._blocking else self._early.union(blocking_names)
        load = self._stager.take(slot.bulk, tensors, early)
        self._submitted = Round(version, began_at, slot, load, blob)
        self._hand_over(self._submitted)
        return stall_s

    def skip(self, version: Version) -> None:
        """Take part in a version's round without data: it aborts on all ranks. Does not wait."""
        self._raise_failure()
        self.stats.skipped += 1
        self._hand_over(Round(version, perf_counter()))

    def wait_staged(self) -> float:
        """Wait until the tensors last submitted may change.

        Returns:
            Seconds waited.
        """
        return self._wait(self._submitted.staged if self._submitted is not None else None)

    def settle(self, timeout_s: float | None = None) -> Version | None:
        """Wait until the last round has ended.

        Args:
            timeout_s: longest wait; None for as long as the transport takes.

        Returns:
            Newest version that all ranks have committed.

        Raises:
            TransportError: a peer is gone, or the time is over.
        """
        self._wait(self._last.ended if self._last is not None else None, timeout_s)
        return self.committed

    def close(self, timeout_s: float | None = None) -> None:
        """End the thread after the rounds handed over, and release the slots.

        Args:
            timeout_s: longest wait. A thread that a peer keeps waiting for longer is left to end with the process, and
                its slots with it. None for as long as the transport takes.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning(
                    "ckptless: rank %d: after %g s its mirror is left behind; its threads stand here:\n%s",
                    self._rank,
                    timeout_s,
                    _stacks(),
                )
                return
            self._thread = None
        let_go(self._failure)
        self._stager.close()
        for slot_pair in self._slot_pairs.values():
            slot_pair.close()

    def _hand_over(self, round_: Round) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="ckptless-mirror", daemon=True)
            self._thread.start()
        self._last = round_
        self._queue.put(round_)

    def _wait(self, moment: Future[None] | None, timeout_s: float | None = None) -> float:
        self._raise_failure()
        if moment is None:
            return 0.0
        began_at = perf_counter()
        try:
            moment.result(timeout_s)
        except TimeoutError as error:
            assert self._last is not None
            raise TransportError(
                f"rank {self._rank}: {self._last.version} was not committed within {timeout_s} s"
            ) from error
        waited_s = perf_counter() - began_at
        self.stats.stall_s += waited_s
        return waited_s

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------ mirror thread

    def _serve(self) -> None:
        while (round_ := self._queue.get()) is not None:
            try:
                self._raise_failure()
                self._run(round_)
            except BaseException as error:  # noqa: BLE001 - the boundary of the thread: the training thread raises it
                self._failure = error
                round_.fail(error)

    def _run(self, round_: Round) -> None:
        self.stats.rounds += 1
        sealed = self._stage(round_)
        self._tell("send", round_.version)
        written = self._delivery.exchange(sealed, lambda source: self._stamp(round_.version, source))
        self.stats.sent_bytes = self._delivery.sent_bytes
        self._tell("agree", round_.version)
        outcome = self._transport.vote(self._vote(whole=written.keys() == self._slot_pairs.keys()))
        if outcome & CHOSEN and self.interval_after is None:
            self.interval_after = round_.version, outcome >> _WORD_AT
        if outcome & WHOLE:
            self._commit(written, round_.version)
        else:
            self.stats.aborted += 1
        if not outcome & CARRY_ON and not self.ending.is_agreed:
            self.ending.agree(self._transport.gather)
        self.stats.last_round_s = perf_counter() - round_.began_at
        round_.ended.set_result(None)

    def _vote(self, *, whole: bool) -> int:
        word = self._interval_word()
        chosen = 0 if word is None else CHOSEN | word << _WORD_AT
        return (WHOLE if whole else 0) | (0 if self._finish_asked() else CARRY_ON) | chosen

    def _stage(self, round_: Round) -> Shipment | None:
        """Fill the own slot and seal it; None when there is nothing to seal."""
        load, slot = round_.load, round_.slot
        if load is None or slot is None:
            return None
        if self.stats.rounds % REWRITE_ROUNDS < 2:
            load.still.forget()
        spared_bytes = self._stager.finish(load, lambda: self._tell("stage", round_.version))
        torn = load.changed()
        self.stats.last_stage_s = perf_counter() - round_.began_at
        round_.staged.set_result(None)
        round_.load = None
        if torn is not None:
            self._stage_blocking_from_now(torn, round_.version)
            return None
        self.stats.staged_bytes += slot.bulk_bytes - spared_bytes
        is_there = load.still.settle()
        still = Known(self._layout.still_bytes(self._rank), load.still.digest)
        slot.seal(self._stamp(round_.version, self._rank), round_.pack(), self._checksum_of(slot, still, round_.pack()))
        return Shipment(slot, round_.pack(), still, is_there)

    def _checksum_of(self, slot: Slot, still: Known, blob: bytes) -> str:
        if self._checksum == NO_CHECKSUM:
            return ""
        changed = bytes_of(slot.bulk[still.length_bytes :]), blob
        rest = digest(self._checksum, changed, threads=self._threads)
        return joined(still.length_bytes, still.digest, rest)

    def _stage_blocking_from_now(self, name: str, version: Version) -> None:
        self.stats.torn += 1
        if not self._blocking:
            self._blocking = True
            log.warning(
                "ckptless: rank %d: %s changed while %s was copied, so that version is given up. From now on the state "
                "is copied before the next batch begins, as staging='blocking' does from the start",
                self._rank,
                name,
                version,
            )

    def _commit(self, written: Mapping[int, Slot], version: Version) -> None:
        for shard, slot in written.items():
            self._slot_pairs[shard].commit(slot)
        self.committed = version
        self.stats.committed += 1
        if self.stats.committed == 1:
            self._arena.retain(self._layout.digest, self._generation)
        self._tell("committed", version)

    def _stamp(self, version: Version, shard: int) -> Stamp:
        return Stamp(version, self._generation, self._layout.world_size, self._layout.digest, shard, self._rank)

    def _tell(self, moment: str, version: Version) -> None:
        if self._probe is not None:
            self._probe(moment, version)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
