"""The mirror: stage, send and commit each version in a round, in a background thread.

    training thread                     mirror thread
    submit: begin the slots, copy
            what forward changes
                                        stage   copy the rest of the own shard, and of what is held for others
    wait_staged, optimizer step         seal    checksum; header becomes `staged`
                                        send    header page to holders, then host state, and what they do not have
                                        verify  compare the checksum of what was filled in for others with theirs
                                        agree   does every rank have all its copies, and do they agree?
                                        commit  headers become `committed`, on all ranks or on none

If a rank has no data for a round (nothing submitted, or a copy torn by a write), the vote fails: all ranks abort the
round and keep the previous version. If replicas differ, all ranks discard them, find out in which pieces, and commit no
further version: later ones follow from the one that differs. Rounds use a transport of their own, so they are not
ordered against collectives of training. What else needs this transport during training runs between rounds, as a job.
"""

from __future__ import annotations

import faulthandler
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch

from lightning_ckptless.errors import TransportError, let_go
from lightning_ckptless.protocol.divergence import Difference
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.checksum import NO_CHECKSUM, bytes_of, digest, joined, matches
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.mirror.coordinated_stop import CoordinatedStop
from lightning_ckptless.replica.mirror.differences import locate_difference
from lightning_ckptless.replica.mirror.exchange import ArrivedShard, KnownPrefix, OutgoingShard, ShardExchange
from lightning_ckptless.replica.mirror.mirror_settings import MirrorSettings
from lightning_ckptless.replica.mirror.moment import Moment
from lightning_ckptless.replica.mirror.rotation import NO_TURN, Rotation, Turn
from lightning_ckptless.replica.mirror.round import Blob, Round
from lightning_ckptless.replica.mirror.round_vote import RoundVote
from lightning_ckptless.replica.mirror.shard_copies import ShardCopier, ShardCopy, sent_spans
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_ring import SlotRing
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Transport


@dataclass
class MirrorStats:
    """Statistics of a mirror.

    Attributes:
        submitted: number of versions submitted.
        rounds: number of rounds, including skipped ones.
        committed: rounds that all ranks committed.
        skipped: rounds in which this rank took part without data.
        aborted: rounds whose vote failed.
        torn: rounds in which a tensor of this rank changed while it was copied.
        differing: rounds whose replicas differed.
        staged_bytes: bytes of tensor state copied into own slots.
        sent_bytes: bytes of tensor state and host state sent to holders.
        last_stage_s: seconds from `submit` until the last version was copied.
        last_round_s: seconds from `submit` until the last round ended.
        stall_s: total time that the training thread has waited for the mirror, in seconds.
    """

    submitted: int = 0
    rounds: int = 0
    committed: int = 0
    skipped: int = 0
    aborted: int = 0
    torn: int = 0
    differing: int = 0
    staged_bytes: int = 0
    sent_bytes: int = 0
    last_stage_s: float = 0.0
    last_round_s: float = 0.0
    stall_s: float = 0.0


class Job(Protocol):
    """Work between two rounds, in the mirror thread, with exclusive use of the transport."""

    @property
    def ended(self) -> Moment:
        """Done when the work is over."""

    def run(self) -> None:
        """Do the work."""

    def fail(self, error: BaseException) -> None:
        """Raise an error in threads that wait for the work."""


log = logging.getLogger(__name__)

COMPARED_ROUNDS = 3
COMPARE_EVERY_ROUNDS = 256
"""The first copies, and every so many later, are compared with the live tensors before these change."""

REWRITE_ROUNDS = 100
"""After this many rounds per slot, the static part is copied and sent again, into all slots."""


_DEFAULT_SETTINGS = MirrorSettings()


class Mirror:
    """Mirrors this rank's shard to its holders, and keeps the shards of its sources.

    All ranks submit or skip the same versions in the same order. Errors in the mirror thread are raised by the next
    call.

    Args:
        arena: arena of this node.
        layout: layout of the state.
        placement: placement of the shards.
        transport: transport that only this mirror uses during a round.
        generation: current generation.
        settings: how versions are copied and verified.
        committed: version from which the state was restored; it is not overwritten until a newer one is committed.
        probe: called in the mirror thread with a moment and the version: `stage` (half of the data copied), `send`,
            `agree`, `committed`; and `go_back` in the thread of the caller, before versions of a ring are discarded.
        vote: returns this rank's vote at the end of a round, given whether it has all its copies. If it is to stop, or
            asks for a rewind, the round starts a coordinated stop.

    Attributes:
        committed: newest version that all ranks have committed.
        stop: the coordinated stop at the end of the run.
        rewind: the coordinated stop at which all ranks decide on a rewind.
        interval_after: first version in whose round all ranks sent the intervals that they accept, and the bitwise AND
            of those. All ranks know it after submitting the following version.
        difference: the first version whose replicas differed; no version is committed after that.
        in_doubt: whether this rank knows of a difference that is not settled, located or not.
        torn: the last version of which a tensor changed before it was copied, found in time or not.
        stats: statistics so far.

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
        settings: MirrorSettings = _DEFAULT_SETTINGS,
        committed: Version | None = None,
        probe: Callable[[str, Version], None] | None = None,
        vote: Callable[[bool], RoundVote] = RoundVote,
    ) -> None:
        self.committed = committed
        self.stop, self.rewind = CoordinatedStop(), CoordinatedStop()
        self.interval_after: tuple[Version, int] | None = None
        self.difference: Difference | None = None
        self.in_doubt = False
        self.torn: Version | None = None
        self.stats = MirrorStats()
        self._arena = arena
        self._layout = layout
        self._transport = transport
        self._generation = generation
        self._settings = settings
        self._probe = probe
        self._vote = vote
        self._blocking = settings.staging != "overlap"
        self._early: frozenset[str] = frozenset()
        self._rank = transport.rank
        self._rings = {shard: self._ring(shard) for shard in (self._rank, *placement.sources(self._rank))}
        self._verifies = settings.verifies and settings.checksum != NO_CHECKSUM
        self._exchange = ShardExchange(
            transport,
            placement.holders[self._rank],
            self._rings,
            lambda shard, holder: sent_spans(layout, shard, holder, verifies=self._verifies),
        )
        copied = self._rings if self._verifies else {self._rank: self._rings[self._rank]}
        self._copier = ShardCopier(layout, self._rank, copied, buffered=settings.staging == "device")
        self._rotation = Rotation(layout, self._rank, placement.holders if self._verifies else ())
        self._rounds_begun = 0
        self._queue: queue.SimpleQueue[Round | Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Round | None = None
        self._newest: Round | Job | None = None
        self._submitted: Round | None = None
        self._failure: BaseException | None = None

    def _ring(self, shard: int) -> SlotRing:
        bulk_bytes, layout, count = self._layout.bulk_bytes(shard), self._layout.digest, self._settings.slots
        slots = self._arena.slots(shard, self._rank, bulk_bytes, layout=layout, count=count)
        return SlotRing(slots, self.committed, self._settings.history_every)

    # ------------------------------------------------------------------ training thread

    @property
    def layout(self) -> Layout:
        """The layout of the mirrored state."""
        return self._layout

    @property
    def turns(self) -> int:
        """Rounds after which every rank has been compared in full; 0 if none is compared in turns."""
        return self._rotation.rounds

    @property
    def oldest(self) -> Version | None:
        """The oldest committed version of the own shard."""
        return self._rings[self._rank].oldest

    @property
    def busy(self) -> bool:
        """Whether a round is in progress, so that `submit` would wait for it."""
        return self._last is not None and not self._last.ended.is_reached

    def bind(self, early: Collection[str]) -> None:
        """Name tensors that every `submit` copies before it returns, in addition to its `blocking_names`."""
        self._early = frozenset(early)

    def submit(
        self,
        version: Version,
        tensors: Mapping[str, torch.Tensor],
        blob: Blob,
        *,
        blocking_names: Collection[str] = (),
    ) -> float:
        """Start the round of a version. Tensors not named must not change until `wait_staged` has returned.

        Args:
            version: the version.
            tensors: this rank's live tensors by name.
            blob: this rank's host state.
            blocking_names: tensors that may change immediately; they are copied before this returns.

        Returns:
            Seconds spent waiting for the previous round.

        Raises:
            TransportError: a peer is lost.
        """
        assert self.committed is None or version > self.committed, f"{version} after {self.committed} was committed"
        return self._submit(version, tensors, blob, blocking_names)

    def _submit(
        self, version: Version, tensors: Mapping[str, torch.Tensor], blob: Blob, blocking_names: Collection[str]
    ) -> float:
        stall_s = self._wait(self._last.ended if self._last is not None else None)
        began_at, at_once = perf_counter(), self._blocking
        early = tensors.keys() if at_once else self._early.union(blocking_names)
        copies = self._copier.take(lambda shard: self._stamp(version, shard), tensors, early)
        compared = copies if self._is_to_be_compared() else ()
        turn = self._next_turn()
        audited = self._rotation.live(NO_TURN if at_once else turn, tensors, self._early)
        self.stats.submitted += 1
        self._submitted = Round(version, began_at, copies, compared, turn, audited, blob)
        if at_once:
            self._submitted.staged.reach()
        self._enqueue(self._submitted)
        return stall_s

    def go_back(
        self,
        version: Version,
        tensors: Mapping[str, torch.Tensor],
        blob: Blob,
        *,
        blocking_names: Collection[str] = (),
    ) -> None:
        """Make an earlier version, as it is now, the newest one. All ranks call it together, before any `submit`.

        It is committed first, then all other versions from it on are discarded. So after a fault in between, either
        the version that was the newest is complete, or this one is the newest complete version.

        Args:
            version: the version.
            tensors: this rank's live tensors by name.
            blob: this rank's host state.
            blocking_names: see `submit`.

        Raises:
            TransportError: a peer is lost, or a rank has not all of its copies.
        """
        self._submit(version, tensors, blob, blocking_names)
        self.wait_staged()
        if self.settle() != version:
            raise TransportError(
                f"rank {self._rank}: {version}, to which all ranks go back, could not be mirrored: at least one rank "
                "did not have all of it"
            )
        snapshot = Snapshot(version, self._generation, self._layout.world_size, self._layout.digest)
        for ring in self._rings.values():
            self._call_probe("go_back", version)
            ring.go_back_to(snapshot)
        self._transport.agree(True)

    def skip(self, version: Version) -> None:
        """Take part in the round of a version without data, which aborts it on all ranks. Does not wait."""
        self._raise_failure()
        self.stats.skipped += 1
        self._enqueue(Round(version, perf_counter(), turn=self._next_turn()))

    def _next_turn(self) -> Turn:
        turn = self._rotation.turn(self._rounds_begun)
        self._rounds_begun += 1
        return turn

    def then(self, job: Job) -> None:
        """Run a job in the mirror thread after the rounds that were submitted. All ranks pass the same jobs."""
        self._raise_failure()
        self._put(job)

    @property
    def is_staged(self) -> bool:
        """Whether `wait_staged` would return at once, and has nothing to compare or to raise."""
        round_ = self._submitted
        if round_ is None or self._failure is not None:
            return self._failure is None
        return round_.staged.is_reached and round_.staged.error is None and not round_.compared

    def wait_staged(self) -> float:
        """Wait until the tensors last submitted may change.

        Returns:
            Seconds waited.
        """
        round_ = self._submitted
        if round_ is None:
            return 0.0
        waited_s = self._wait(round_.staged)
        compared, round_.compared = round_.compared, ()
        name = next((name for copy in compared if (name := copy.pending.different()) is not None), None)
        if name is not None:
            self.torn = round_.version
            self._stage_blocking_from_now(
                name,
                f"between {round_.version} and the next optimizer step, so that version may mix old and new values",
            )
        return waited_s

    def _is_to_be_compared(self) -> bool:
        earlier = self.stats.submitted
        return not self._blocking and (earlier < COMPARED_ROUNDS or earlier % COMPARE_EVERY_ROUNDS == 0)

    def settle(self, timeout_s: float | None = None) -> Version | None:
        """Wait until the last round has ended, and the last job: the transport is free from then on.

        Args:
            timeout_s: longest wait, in seconds; None for the timeout of the transport.

        Returns:
            The newest version that all ranks have committed.

        Raises:
            TransportError: a peer is lost, or the wait timed out.
        """
        self._wait(self._newest.ended if self._newest is not None else None, timeout_s)
        return self.committed

    def close(self, timeout_s: float | None = None) -> None:
        """Stop the thread after the queued rounds, and release the slots.

        Args:
            timeout_s: longest wait, in seconds. A thread that is still blocked by a peer after that is abandoned with
                its slots until the process exits. None for the timeout of the transport.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning(
                    "ckptless: rank %d: abandoning its mirror thread, which has not stopped within %g s; stacks:\n%s",
                    self._rank,
                    timeout_s,
                    _stacks(),
                )
                return
            self._thread = None
        let_go(self._failure)
        self._copier.close()
        for ring in self._rings.values():
            ring.close()

    def _enqueue(self, round_: Round) -> None:
        self._last = round_
        self._put(round_)

    def _put(self, item: Round | Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="ckptless-mirror", daemon=True)
            self._thread.start()
        self._newest = item
        self._queue.put(item)

    def _wait(self, moment: Moment | None, timeout_s: float | None = None) -> float:
        self._raise_failure()
        if moment is None:
            return 0.0
        began_at = perf_counter()
        try:
            moment.wait(timeout_s)
        except TimeoutError as error:
            what = "what was submitted" if self._last is None else self._last.version
            raise TransportError(f"rank {self._rank}: {what} was not committed within {timeout_s} s") from error
        waited_s = perf_counter() - began_at
        self.stats.stall_s += waited_s
        return waited_s

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------ mirror thread

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._raise_failure()
                if isinstance(item, Round):
                    self._run(item)
                else:
                    item.run()
            except BaseException as error:  # noqa: BLE001 - boundary of the thread: the training thread raises it
                self._failure = error
                item.fail(error)

    def _run(self, round_: Round) -> None:
        self.stats.rounds += 1
        version, rewrites = round_.version, self._rewrites_static()
        copies, found = self._stage(round_, rewrites=rewrites)
        own = self._seal_own(round_, copies.get(self._rank), rewrites=rewrites)
        self._call_probe("send", version)
        begun = {shard: copy.slot for shard, copy in copies.items()}
        audits = self._rotation.messages(round_.turn, found)
        arrived = self._exchange.exchange(own, begun, lambda source: self._stamp(version, source), audits)
        self.stats.sent_bytes = self._exchange.sent_bytes
        written, differing = self._seal_arrived(arrived, copies)
        if own is not None:
            written[self._rank] = own.slot
            if self._rotation.differs(round_.turn, audits[1], own.slot.bulk, self._early):
                differing.append(self._rank)
        self.in_doubt = self.in_doubt or bool(differing)
        self._call_probe("agree", version)
        is_complete = written.keys() == self._rings.keys() and self.difference is None
        vote = self._vote(is_complete)
        if differing or self.difference is not None:
            vote = replace(vote, no_difference=False)
        outcome = vote.combine(self._transport.vote)
        if outcome.accepted_intervals is not None and self.interval_after is None:
            self.interval_after = version, outcome.accepted_intervals
        if not outcome.no_difference:
            self._discard(version, written, differing)
        elif outcome.complete:
            self._commit(written, version)
        else:
            self.stats.aborted += 1
        if outcome.stop is not None and not self.stop.is_agreed:
            self.stop.agree(self._transport.gather, outcome.stop)
        if not (outcome.no_rewind and outcome.no_difference) and not self.rewind.is_agreed:
            self.rewind.agree(self._transport.gather)
        self.stats.last_round_s = perf_counter() - round_.began_at
        round_.ended.reach()

    def _rewrites_static(self) -> bool:
        slots = self._settings.slots
        return self.stats.rounds % (REWRITE_ROUNDS * slots) >= (REWRITE_ROUNDS - 1) * slots

    def _stage(self, round_: Round, *, rewrites: bool) -> tuple[dict[int, ShardCopy], str]:
        """Complete the copies of this rank's tensors.

        Returns:
            The copies by shard, none if they are torn, and the digest of what is compared for another rank.
        """
        copies, round_.copies = round_.copies, ()
        if not copies:
            return {}, ""
        version = round_.version
        staged_bytes = self._copier.finish(copies, lambda: self._call_probe("stage", version), rewrites=rewrites)
        found = round_.audited.digest()
        torn = next((name for copy in copies if (name := copy.pending.changed()) is not None), None)
        self.stats.last_stage_s = perf_counter() - round_.began_at
        if not round_.staged.is_reached:
            round_.staged.reach()
        if torn is not None:
            self.stats.torn += 1
            self.torn = version
            self._stage_blocking_from_now(torn, f"while {version} was copied, so this version is discarded")
            return {}, ""
        self.stats.staged_bytes += staged_bytes
        return {copy.shard: copy for copy in copies}, found

    def _seal_own(self, round_: Round, copy: ShardCopy | None, *, rewrites: bool) -> OutgoingShard | None:
        if copy is None:
            return None
        blob = round_.pack()
        checksum, static = self._checksum_of(copy, blob)
        copy.slot.seal(self._stamp(round_.version, self._rank), blob, checksum)
        return OutgoingShard(copy.slot, blob, static, repeats_static=rewrites)

    def _checksum_of(self, copy: ShardCopy, blob: bytes | memoryview) -> tuple[str, KnownPrefix]:
        """The checksum of a slot that this rank has filled, and its static part."""
        copy.pending.static.settle()
        static = KnownPrefix(self._layout.static_bytes(copy.shard), copy.pending.static.digest)
        if self._settings.checksum == NO_CHECKSUM:
            return "", static
        changed = bytes_of(copy.slot.bulk)[static.length_bytes :], blob
        rest = digest(self._settings.checksum, changed, threads=self._settings.threads)
        return joined(static.length_bytes, static.digest, rest), static

    def _seal_arrived(
        self, arrived: Mapping[int, ArrivedShard], copies: Mapping[int, ShardCopy]
    ) -> tuple[dict[int, Slot], list[int]]:
        """Seal the slots held for other ranks; returns them, and the shards whose source has other bytes."""
        written: dict[int, Slot] = {}
        differing: list[int] = []
        for shard, arriving in arrived.items():
            slot, blob, checksum = arriving.slot, bytes_of(arriving.blob), arriving.page.header.checksum
            if self._verifies:
                if shard not in copies:
                    continue  # The vote fails: this rank has no data in this round.
                if arriving.wrote_static:
                    copies[shard].pending.static.received()
                found, _ = self._checksum_of(copies[shard], blob)
                # A source with another number of threads writes the same digest in another form.
                if found != checksum and not matches(checksum, (bytes_of(slot.bulk), blob)):
                    checksum = found
                    differing.append(shard)
            slot.seal(replace(arriving.page.header.stamp, holder=self._rank), blob, checksum)
            written[shard] = slot
        return written, differing

    def _discard(self, version: Version, written: Mapping[int, Slot], differing: Collection[int]) -> None:
        """Discard a version whose replicas differ, or that follows from one, and find out where they differ."""
        self.in_doubt = True
        self.stats.differing += 1
        self.stats.aborted += 1
        if self.difference is None:
            self.difference = locate_difference(version, differing, written, self._layout, self._transport)
        for slot in written.values():
            slot.discard()

    def _stage_blocking_from_now(self, name: str, when: str) -> None:
        if not self._blocking:
            self._blocking = True
            log.warning(
                "ckptless: rank %d: %s changed %s. From now on the state is copied before the next batch starts, as "
                "with staging='blocking'",
                self._rank,
                name,
                when,
            )

    def _commit(self, written: Mapping[int, Slot], version: Version) -> None:
        for shard, slot in written.items():
            self._rings[shard].commit(slot)
        self.committed = version
        self.stats.committed += 1
        if self.stats.committed == 1:
            self._arena.retain(self._layout.digest, self._generation, count=self._settings.slots)
        self._call_probe("committed", version)

    def _stamp(self, version: Version, shard: int) -> Stamp:
        return Stamp(version, self._generation, self._layout.world_size, self._layout.digest, shard, self._rank)

    def _call_probe(self, moment: str, version: Version) -> None:
        if self._probe is not None:
            self._probe(moment, version)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
