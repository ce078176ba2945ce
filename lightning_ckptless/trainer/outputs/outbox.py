"""The outbox: holds rows back until their step is committed, then delivers them to the loggers.

A row that is logged in a step which a fault rolls back would reach a tracking service twice, and cannot be withdrawn.
So `log_metrics` of each logger holds rows back, and they are delivered when the version that includes their step is
committed. Rows that are still held are part of that version: the process that restores it delivers them.

Rows are numbered over the whole run. The number of each delivered row is written to a file beside the arena, so that a
process which restores the version does not deliver rows again. The same numbers drop the rows of replayed steps that
had already been delivered: at the end of `fit`, or after a durable state that is older.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.state.plain_values import is_plain

log = logging.getLogger(__name__)

_METHODS = ("log_metrics", "save", "finalize")


class Marks:
    """How many rows of each logger were delivered, in files that outlive this process.

    Args:
        paths: paths of the files; a file that cannot be written is ignored.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: list[int] = []
        for path in paths:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def read(self, logger: int) -> int:
        """Number of delivered rows of a logger, the maximum over all files."""
        found = [os.pread(file, 8, 8 * logger) for file in self._files]
        return max((struct.unpack("<q", data)[0] for data in found if len(data) == 8), default=0)

    def write(self, logger: int, rows: int) -> None:
        """Record the number of delivered rows of a logger."""
        for file in self._files:
            os.pwrite(file, struct.pack("<q", rows), 8 * logger)

    def clear(self) -> None:
        """Forget all rows: the run starts over."""
        for file in self._files:
            os.ftruncate(file, 0)

    def close(self) -> None:
        """Close the files without removing them."""
        while self._files:
            os.close(self._files.pop())


MayLeave = Callable[[Packed], bool]


@dataclass(frozen=True, slots=True)
class Held:
    """One call that is held back.

    Args:
        number: number of the row; a `save` has that of the row before it.
        row: arguments of `log_metrics`; None for a `save`.
    """

    number: int
    row: tuple[tuple[Any, ...], dict[str, Any]] | None

    def pack(self, may_leave: MayLeave) -> tuple[int, str, Any]:
        """The call as plain data.

        Args:
            may_leave: returns whether a pickled row may be part of a version.
        """
        if self.row is None or is_plain(list(self.row)):
            return self.number, "plain", self.row
        try:
            if may_leave(packed := pack(self.row)):
                return self.number, "pickled", packed
        except (pickle.PicklingError, TypeError, AttributeError, ValueError):
            pass
        return self.number, "lost", sorted(map(str, self.row[0][0] if self.row[0] else self.row[1]["metrics"]))


class Box:
    """The rows of one logger.

    Args:
        logger: logger whose `log_metrics`, `save` and `finalize` are intercepted from now on.
        mark: called with the number of each delivered row.

    Attributes:
        counted: rows that have been logged in the run.
        delivered: rows that the logger has received.
        is_silent: whether rows are dropped, because the step that logs them does not count.
    """

    def __init__(self, logger: Any, mark: Callable[[int], None]) -> None:
        self.logger = logger
        self.is_silent = False
        self.counted = 0
        self.delivered = 0
        self._is_numbered = False
        self._mark = mark
        self._held: deque[Held] = deque()
        self._own: dict[str, Callable[..., Any]] = {name: getattr(logger, name) for name in _METHODS}
        for name in _METHODS:
            of_instance = name in vars(logger) or not hasattr(type(logger), name)
            own = self._own[name] if of_instance else None
            setattr(logger, name, Interception(logger, name, getattr(self, name), own))

    def remove(self) -> None:
        """Restore the logger's own methods."""
        for name in _METHODS:
            interception = vars(self.logger).get(name)
            if isinstance(interception, Interception):
                interception.remove()

    # ------------------------------------------------------------------ intercepted methods

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Hold a row back, or drop it if the logger has already received it."""
        if self.is_silent:
            return
        self.counted += 1
        if self.counted > self.delivered:
            self._held.append(Held(self.counted, (_frozen(args), _frozen(kwargs))))

    def save(self) -> None:
        """Save after the rows that are held; at once if there are none."""
        if self.is_silent:
            return
        if not self._held:
            self._own["save"]()
        elif self._held[-1].row is not None:
            self._held.append(Held(self.counted, None))

    def finalize(self, *args: Any, **kwargs: Any) -> Any:
        """Deliver all rows, then finalize."""
        self.deliver(self.counted)
        return self._own["finalize"](*args, **kwargs)

    # ------------------------------------------------------------------ delivery

    def deliver(self, limit: int) -> None:
        """Deliver the rows up to a number."""
        while self._held and self._held[0].number <= limit:
            held = self._held[0]
            if held.row is None:
                self._own["save"]()
            else:
                self._own["log_metrics"](*held.row[0], **held.row[1])
                self.delivered = held.number
                self._mark(held.number)
            self._held.popleft()

    # ------------------------------------------------------------------ state

    def capture(self, may_leave: MayLeave) -> dict[str, Any]:
        """Capture the numbers and the held rows."""
        self._is_numbered = True
        return {
            "counted": self.counted,
            "handed_on": self.delivered,
            "held": [held.pack(may_leave) for held in self._held],
        }

    def restore(self, saved: dict[str, Any] | None, delivered: int) -> None:
        """Restore the state at a version.

        Args:
            saved: result of `capture`; None for a rank that has logged nothing.
            delivered: rows that the logger has received, from this process or an earlier one.
        """
        # Rows that a replacement has logged so far were logged before, under other numbers.
        here = {held.number: held for held in self._held if held.row is not None and self._is_numbered}
        self._held.clear()
        self._is_numbered = True
        self.counted, self.delivered = (saved["counted"] if saved is not None else 0), delivered
        lost: list[str] = []
        for number, form, content in saved["held"] if saved is not None else ():
            if form == "plain" and content is None:
                self._held.append(Held(number, None))
            elif number <= delivered:
                continue
            elif number in here:
                self._held.append(here[number])
            elif form == "lost":
                lost += content
            else:
                self._held.append(Held(number, unpack(content) if form == "pickled" else content))
        if lost:
            log.warning(
                "ckptless: %s: rows with %s were lost with the process that logged them: they contain objects that "
                "cannot be pickled, or whose classes are not in trusted_classes",
                type(self.logger).__name__, ", ".join(lost),
            )  # fmt: skip


class Interception:
    """Replaces a method in a logger's attributes; a copy of the logger has the original method.

    Args:
        logger: logger that has the method.
        name: name of the method.
        call: function that is called instead.
        own: previous value of the attribute; None if the method was defined by the class.
    """

    def __init__(self, logger: Any, name: str, call: Callable[..., Any], own: Any) -> None:
        functools.update_wrapper(self, getattr(logger, name))
        self._logger, self._name, self._call, self._own = logger, name, call, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_as_it_was, (self._own,)) if self._own is not None else (_of_class, (self._logger, self._name))

    def remove(self) -> None:
        """Restore the original method."""
        if self._own is not None:
            setattr(self._logger, self._name, self._own)
        else:
            delattr(self._logger, self._name)


def _of_class(logger: Any, name: str) -> Any:
    return MethodType(getattr(type(logger), name), logger)


def _as_it_was(own: Any) -> Any:
    return own


def _frozen(value: Any) -> Any:
    """A copy of a value that does not change when the script modifies what it has logged."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (dict, list, tuple):
        items = ((key, _frozen(item)) for key, item in value.items()) if type(value) is dict else map(_frozen, value)
        return type(value)(items)
    return value


class Outbox:
    """The boxes of a trainer's loggers.

    Args:
        loggers: loggers of the trainer, without those that write nothing.
        marks: number of delivered rows of each logger.
    """

    def __init__(self, loggers: Sequence[Any], marks: Marks) -> None:
        self._marks = marks
        self._taken: deque[tuple[Version, list[int]]] = deque()
        self._boxes = [Box(logger, functools.partial(self._mark, index)) for index, logger in enumerate(loggers)]

    def _mark(self, index: int, rows: int) -> None:
        self._marks.write(index, rows)

    def use(self, marks: Marks) -> None:
        """Use other marks: this process has changed its rank."""
        self._marks.close()
        self._marks = marks

    def capture(self, version: Version, may_leave: MayLeave = lambda _: True) -> list[dict[str, Any]]:
        """Capture the boxes; the rows that they hold are delivered when the version is committed.

        Args:
            version: the version that they become part of.
            may_leave: returns whether a pickled row may be part of it; other rows are lost with this process.
        """
        self._taken.append((version, [box.counted for box in self._boxes]))
        return [box.capture(may_leave) for box in self._boxes]

    def restore(
        self, saved: list[dict[str, Any]] | None, *, rewound: Sequence[Any], before: Callable[[Any, int], None]
    ) -> None:
        """Restore the state at a committed version, and deliver its rows.

        Args:
            saved: result of `capture`; None for a rank that has logged nothing.
            rewound: loggers whose files were rewound to the version.
            before: called with each logger and the number of rows it has received, before it receives more.
        """
        self._taken.clear()
        for index, box in enumerate(self._boxes):
            state = saved[index] if saved is not None and index < len(saved) else None
            known = state["handed_on"] if state is not None else 0
            is_rewound = any(logger is box.logger for logger in rewound)
            box.restore(state, known if is_rewound else max(known, self._marks.read(index)))
            before(box.logger, box.delivered)
        self.flush()

    def start_over(self) -> None:
        """Forget all delivered rows: the run starts over from its first step."""
        self._marks.clear()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Context in which rows are dropped."""
        for box in self._boxes:
            box.is_silent = True
        try:
            yield
        finally:
            for box in self._boxes:
                box.is_silent = False

    def deliver(self, committed: Version | None) -> None:
        """Deliver the rows of all versions up to the committed one."""
        limits = None
        while committed is not None and self._taken and self._taken[0][0] <= committed:
            _, limits = self._taken.popleft()
        for box, limit in zip(self._boxes, limits or (), strict=False):
            box.deliver(limit)

    def flush(self) -> None:
        """Deliver all rows."""
        for box in self._boxes:
            box.deliver(box.counted)

    def remove(self) -> None:
        """Restore the loggers' own methods."""
        for box in self._boxes:
            box.remove()
        self._boxes = []
        self._marks.close()
