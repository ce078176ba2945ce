"""Calls the user's `train_dataloader()` and `val_dataloader()` in a new process with their original inputs.

With `reload_dataloaders_every_n_epochs`, or when a run starts from a checkpoint file, these hooks are called in the
middle of a run. Their result may depend on `current_epoch` and `global_step`, on attributes and generators of the
module, its parts, the datamodule and callbacks, and on the global generators. All of these are recorded with each call.
To recreate the dataloaders of a restored version, a process calls the hooks with the record of that version instead of
its own state.

A call at the very start of a run needs no record: every process reaches it in the same state. Weights are not part of
a record: a hook that evaluates the model sees those of the restored version.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng

TRAIN, VALIDATION = "train", "validation"

Records = dict[str, Packed | None]


class DataHooks:
    """The dataloader hooks of one trainer.

    Args:
        trainer: trainer in `fit`, before its data is set up.
        loops: the trainer's loops.

    Attributes:
        made: by hook, the record of the call that created the current dataloaders; None for a call at the start of the
            run. A hook that was not called is missing.
    """

    def __init__(self, trainer: Any, loops: FitLoops) -> None:
        self.made: Records = {}
        self._trainer = trainer
        self._loops = loops
        self._host_state: Callable[[], HostState] | None = None
        self._at_beginning: Packed | None = None
        self._replayed: Records = {}
        self._is_busy = False
        self._all_are_recorded = False
        self._note: Callable[[Records], None] = lambda _: None
        for name in (TRAIN, VALIDATION):
            loops.wrap_data_source(name, lambda own, name=name: self._call(name, own))  # type: ignore[misc]

    def begin(self, host_state: Callable[[], HostState], note: Callable[[Records], None], *, is_new: bool) -> None:
        """Start recording: the model is set up and the loops are about to run.

        Args:
            host_state: returns the host state of the trainer.
            note: stores the records where a new process finds them before it joins the other ranks.
            is_new: whether this process joins a run in progress.
        """
        self._host_state, self._note = host_state, note
        if is_new:
            self._at_beginning = self._record()

    def record_from_now_on(self) -> None:
        """Record calls at the start too: a new process does not repeat what precedes them."""
        self._all_are_recorded = True
        if self._host_state is not None:
            # Build it for the current callbacks: a tuner replaces them.
            self._host_state()

    def expect(self, records: Records) -> None:
        """Call the hooks with these records until a version says otherwise."""
        self._replayed = dict(records)
        if records.get(TRAIN) is not None and self.made.get(TRAIN, records[TRAIN]) != records[TRAIN]:
            self._loops.forget_training_data()

    def make_as(self, records: Records, alone: Callable[[], AbstractContextManager[None]]) -> None:
        """Recreate the dataloaders that differ from those of a version.

        Args:
            records: the records of the version.
            alone: context without waits for other ranks, which may have their dataloaders already.
        """
        different = [name for name in (TRAIN, VALIDATION) if self._differs(name, records)]
        self._replayed = dict(records)
        with alone():
            for name in different:
                if name in records:
                    self._loops.make_data_again(name)
                else:
                    self._loops.forget_validation_data()
                    self.made.pop(name)
        self._replayed = {}

    def _differs(self, name: str, records: Records) -> bool:
        if (name in records) != (name in self.made):
            return name in records or name == VALIDATION
        return name in records and records[name] != self.made[name]

    @contextmanager
    def as_made(self) -> Iterator[None]:
        """Call the hooks as they were called for the current dataloaders."""
        self._replayed = dict(self.made)
        try:
            yield
        finally:
            self._replayed = {}

    # ------------------------------------------------------------------ a call

    def _call(self, name: str, own: Callable[[], Any]) -> Any:
        if self._is_busy:
            return own()
        self._is_busy = True
        try:
            if name in self._replayed and self._host_state is not None:
                return self._call_with(name, own)
            self.made[name] = None if self._needs_no_record() else self._record()
            if self.made[name] is not None:
                self._note(self.made)
            return own()
        finally:
            self._is_busy = False

    def _needs_no_record(self) -> bool:
        return self._host_state is None or (self._loops.is_at_beginning and not self._all_are_recorded)

    def _call_with(self, name: str, own: Callable[[], Any]) -> Any:
        assert self._host_state is not None
        record = self.made[name] = self._replayed[name]
        saved = self._at_beginning if record is None else record
        if saved is None or (record is None and self._loops.is_at_beginning):
            return own()
        before = self._record()
        self._become(saved)
        try:
            return own()
        finally:
            self._become(before)

    def _record(self) -> Packed:
        assert self._host_state is not None
        return pack({"counters": self._loops.counters(), "shown": self._host_state().shown(), "rng": capture_rng()})

    def _become(self, record: Packed) -> None:
        assert self._host_state is not None
        state = unpack(record)
        self._loops.set_counters(state["counters"])
        self._host_state().show(state["shown"])
        apply_rng(state["rng"])


def to_note(records: Records) -> dict[str, str | None]:
    """Encode records for JSON."""
    return {name: None if data is None else base64.b64encode(data).decode() for name, data in records.items()}


def from_note(note: Mapping[str, str | None] | None) -> Records:
    """Decode what `to_note` returned."""
    return {name: None if data is None else Packed(base64.b64decode(data)) for name, data in (note or {}).items()}
