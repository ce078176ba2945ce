"""The loggers of a run across all processes that write to them: one logger run each, and every row once.

This module combines three mechanisms: identifying the run a logger writes to (`internals.lightning.logger_identity`),
holding rows back until their step is committed (`outbox`), and truncating log files to a version
(`internals.lightning.log_files`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning import log_files as host_loggers
from lightning_ckptless.internals.lightning.logger_identity import (
    begin_after,
    can_be_continued,
    forget_identity,
    identity_of,
    is_dummy,
    keeps_rows_until_it_ends,
    set_identity,
    variables_of,
    write_soon,
    writes_elsewhere,
)
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.trainer.outputs.outbox import Marks, MayLeave, Outbox
from lightning_ckptless.trainer.session.member_set import MemberSet

log = logging.getLogger(__name__)

Identities = list[dict[str, Any]]
Captured = dict[str, Any]
Positions = list[dict[str, Any] | None]
"""Position in each log file; None for a logger without one."""


class RunLoggers:
    """The loggers of one trainer.

    Args:
        trainer: trainer in `fit`.
        run_folder: folder of the run.
        fit_index: number of earlier calls of `fit` in this process.
    """

    def __init__(self, trainer: Any, run_folder: Path, fit_index: int) -> None:
        self._trainer = trainer
        self._run_folder = run_folder
        self._fit_index = fit_index
        self._loggers = [logger for logger in trainer.loggers if not is_dummy(logger)]
        self._chosen: Identities | None = None
        self._outbox: Outbox | None = None
        self._restore_environment: Callable[[], object] = lambda: None

    # ------------------------------------------------------------------ identity

    @property
    def identities(self) -> Identities:
        """The runs that the loggers write to, for a process that starts later."""
        return [{"kind": type(logger).__name__, "identity": identity_of(logger)} for logger in self._loggers]

    def warn_of_unknown_loggers(self) -> None:
        """Warn of loggers whose run a replacement of rank 0 cannot continue."""
        for kind in dict.fromkeys(type(logger).__name__ for logger in self._loggers if not can_be_continued(logger)):
            log.warning(
                "ckptless: %s: the run that this logger writes to cannot be identified, so a process that replaces "
                "rank 0 will open another one. Define ckptless_identity() and set_ckptless_identity(identity) on it "
                "(see the guide on loggers)", kind
            )  # fmt: skip
        for kind in dict.fromkeys(type(lg).__name__ for lg in self._loggers if keeps_rows_until_it_ends(lg)):
            log.warning(
                "ckptless: %s: in offline mode, rows are in a temporary folder until the process ends. Rows of a "
                "process that is killed will be missing from the archive of its replacement. Log online, or add a "
                "CSVLogger (see the guide on loggers)", kind
            )  # fmt: skip

    def identify(self, saved: Identities | None) -> None:
        """Continue the logger runs of an earlier process; called before `experiment` is first accessed.

        Args:
            saved: the earlier process's `identities`; None if this process is the first.
        """
        if saved is None:
            return
        if self._chosen is None:
            self._chosen = self.identities
        self._set(saved)
        host_loggers.note_saved_config(self._trainer.callbacks, saved=True)

    def _set(self, saved: Identities) -> None:
        for logger, facts in zip(self._loggers, saved, strict=False):
            if type(logger).__name__ != facts["kind"]:
                continue
            set_identity(logger, facts["identity"])
            if self._trainer.is_global_zero and writes_elsewhere(logger, facts["identity"]):
                log.warning(
                    "ckptless: %s: the script opened another run before fit, and later rows go there. Pass the run's "
                    "id to the logger, or access logger.experiment only after fit has begun",
                    facts["kind"],
                )

    def identify_as_noted(self, members: MemberSet) -> None:
        """Continue the runs known to any node, and store them on all nodes: rank 0 may move to any of them."""
        if (saved := members.noted.logger_identities) is not None:
            self.identify(saved)
            if members.is_node_leader:
                members.arena.write_notes(ArenaNotes(logger_identities=saved))

    def identify_alone(self, notes: ArenaNotes) -> None:
        """Continue the runs of the process that this one replaces, as far as the notes of this node name them."""
        saved = notes.logger_identities
        if saved is None:
            with suppress(OSError, ValueError):
                saved = json.loads(self._file.read_text())
        self.identify(saved)

    def note(self, members: MemberSet) -> None:
        """Store on every node which runs rank 0 writes to; the loggers are open. All ranks call it together."""
        identities = members.gather(self.identities)[0]
        if members.is_node_leader:
            members.arena.write_notes(ArenaNotes(logger_identities=identities))
        if self._trainer.is_global_zero:
            with suppress(OSError):
                self._run_folder.mkdir(parents=True, exist_ok=True)
                self._file.write_text(json.dumps(identities))
                if not self._fit_index:
                    environment.keep_for_rank_zero(self._run_folder, variables_of(self._loggers))

    @property
    def _file(self) -> Path:
        return self._run_folder / f"loggers-{self._fit_index}.json"

    def start_new_runs(self) -> None:
        """Write to new runs, as on any resume from a file: the rows of the old runs are left as they are."""
        for logger, facts in zip(self._loggers, self._chosen or (), strict=False):
            forget_identity(logger)
            set_identity(logger, {name: value for name, value in facts["identity"].items() if name != "_version"})
        host_loggers.note_saved_config(self._trainer.callbacks, saved=False)
        if self._outbox is not None:
            self._outbox.start_over()

    # ------------------------------------------------------------------ rows

    def hold(self, arena: Path) -> None:
        """Hold rows back until their step is committed.

        Args:
            arena: folder of the node's arena.
        """
        marks = self._marks(arena)
        if self._outbox is None:
            self._restore_environment = write_soon(self._loggers)
            self._outbox = Outbox(self._loggers, marks)
        else:
            self._outbox.use(marks)

    def _marks(self, arena: Path) -> Marks:
        rank = self._trainer.global_rank
        return Marks([folder / f"rows-{self._fit_index}-of-{rank:04d}" for folder in (arena, self._run_folder)])

    def deliver(self, committed: Version | None) -> None:
        """Deliver the rows of all versions up to the committed one."""
        if self._outbox is not None:
            self._outbox.deliver(committed)

    def flush(self) -> None:
        """Deliver all rows: nothing that was logged will be logged again."""
        if self._outbox is not None:
            self._outbox.flush()

    def silenced(self) -> AbstractContextManager[None]:
        """Context in which rows are dropped: the step that logs them does not count."""
        return nullcontext() if self._outbox is None else self._outbox.silenced()

    def release(self) -> None:
        """Deliver all rows and restore the loggers' own methods."""
        if self._outbox is None:
            return
        try:
            self._outbox.flush()
        except Exception:
            log.exception("ckptless: rows were lost at the end of fit: a logger raised")
        finally:
            self._outbox.remove()
            self._outbox = None
            self._restore_environment()

    # ------------------------------------------------------------------ state

    def capture(self, version: Version, may_leave: MayLeave = lambda _: True) -> Captured:
        """Capture the positions of the log files, and the rows held back, for a version.

        Args:
            version: the version.
            may_leave: see `Outbox.capture`.
        """
        assert self._outbox is not None
        return {
            "files": host_loggers.log_positions(self._trainer.loggers) if self._trainer.is_global_zero else None,
            "rows": self._outbox.capture(version, may_leave),
        }

    def cut(self, saved: Captured) -> None:
        """Truncate the log files to a version, before they are opened; done by rank 0."""
        if self._trainer.is_global_zero and saved["files"] is not None:
            host_loggers.cut_logs(self._trainer, saved["files"])

    def restore(self, saved: Captured | None) -> None:
        """Restore the state at a committed version; the loggers are open.

        Args:
            saved: result of `capture`; None for a rank that has logged nothing.
        """
        assert self._outbox is not None
        rewound: list[Any] = []
        if saved is not None and saved["files"] is not None and self._trainer.is_global_zero:
            host_loggers.rewind_logs(self._trainer, saved["files"])
            pairs = zip(self._trainer.loggers, saved["files"], strict=False)
            rewound = [logger for logger, position in pairs if position is not None]
        self._outbox.restore(saved["rows"] if saved is not None else None, rewound=rewound, before=begin_after)

    @property
    def at_first(self) -> Positions:
        """The positions of empty log files."""
        return host_loggers.empty_positions(self._trainer.loggers)

    def cut_to(self, positions: Positions) -> None:
        """Truncate the log files to their positions when the fit began, before they are opened; done by rank 0."""
        if self._trainer.is_global_zero:
            host_loggers.cut_logs(self._trainer, positions)

    def start_over(self) -> None:
        """Forget all delivered rows: the run starts over from its first step."""
        assert self._outbox is not None
        self._outbox.start_over()

    def keep(self) -> None:
        """Open the log files without truncating them; done by rank 0."""
        if self._trainer.is_global_zero:
            host_loggers.keep_logs(self._trainer)

    def watch(self) -> None:
        """Count every row that is written to a log file; done by rank 0."""
        if self._trainer.is_global_zero:
            host_loggers.watch_logs(self._trainer.loggers)
