"""Requests to a live run from another terminal, as files in the run's folder.

    terminal   writes ID.request, and waits for ID.answer
    agent      takes the request by renaming it to ID.taken; the rename lets only one agent have it
               carries it out, writes ID.answer and removes ID.taken

Files need no port, and every node that sees the run's folder can take a request. The folder is private: a request that
another user may have written is ignored.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.formats import schema
from lightning_ckptless.formats.sealed import parse, seal, unseal
from lightning_ckptless.system.private_files import require_private

log = logging.getLogger(__name__)

FOLDER_NAME = "requests"
FORMAT = 1
LOOK_EVERY_S = 0.05
"""How often `submit` looks for the answer."""
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RewindRequest:
    """Roll all ranks back to an earlier step.

    Args:
        to_step: optimizer step to return to; None to count from the newest one.
        steps: number of optimizer steps to go back; None if `to_step` is given.
        skip_batches: number of batches to skip after that step.
    """

    to_step: int | None = None
    steps: int | None = None
    skip_batches: int = 0


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """Move work off a node or a rank before it is taken away.

    Args:
        node: rank of the node; None if `rank` is given.
        rank: rank of the worker; None if `node` is given.
    """

    node: int | None = None
    rank: int | None = None


Request = RewindRequest | DrainRequest

_STEP = schema.optional(schema.STEP)
_RANK = schema.optional(schema.RANK)
_SCHEMAS = {
    RewindRequest: schema.record(RewindRequest, to_step=_STEP, steps=_STEP, skip_batches=schema.STEP),
    DrainRequest: schema.record(DrainRequest, node=_RANK, rank=_RANK),
}
_BY_NAME = {kind.__name__: check for kind, check in _SCHEMAS.items()}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request.

    Args:
        accepted: whether it was carried out.
        reason: what was done, or why not.
    """

    accepted: bool
    reason: str


_ANSWER = schema.record(Answer, accepted=schema.boolean, reason=schema.text())


def submit(
    run_folder: Path,
    request: Request,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Answer:
    """Send a request to a live run and wait for its answer.

    Args:
        run_folder: folder of the run.
        request: the request.
        timeout_s: longest wait for an agent to take the request, and then for its answer.
        clock: monotonic time.
        pause: waits for a number of seconds.

    Raises:
        LaunchError: no agent has taken or answered the request in time. One that was not taken is withdrawn.
        OptionsError: the folder of requests is not private.
        OSError: the folder is not writable.
    """
    folder = run_folder / FOLDER_NAME
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        require_private(folder)
    except PermissionError as error:
        raise OptionsError(f"requests to the run are not safe: {error}") from error
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    asked, taken, answered = (folder / f"{name}.{state}" for state in ("request", "taken", "answer"))
    _write(asked, seal(type(request).__name__, FORMAT, asdict(request)))
    until, was_taken = clock() + timeout_s, False
    try:
        while True:
            if answered.exists():
                return _read_answer(answered)
            if not was_taken and taken.exists():
                until, was_taken = clock() + timeout_s, True
            if clock() > until:
                break
            pause(LOOK_EVERY_S)
    finally:
        # If the rename in between succeeds, an agent has the request after all, and its answer is not read.
        asked.unlink(missing_ok=True)
        answered.unlink(missing_ok=True)
    if was_taken:
        raise LaunchError(
            f"an agent of {run_folder.name} has taken the request, but not answered within {timeout_s:g} s: "
            f"`ckptless status {run_folder.name}` shows whether it is still being carried out"
        )
    raise LaunchError(
        f"no agent of {run_folder.name} has taken the request within {timeout_s:g} s, so it was withdrawn: "
        f"check with `ckptless status {run_folder.name}` that the run is alive, and that its node shares {folder}"
    )


@dataclass(frozen=True, slots=True)
class TakenRequest:
    """A request that this agent has taken and must answer.

    Args:
        request: the request.
        path: its file.
    """

    request: Request
    path: Path

    def answer(self, *, accepted: bool, reason: str) -> None:
        """Answer the request. A terminal that no longer waits leaves the answer unread."""
        with suppress(OSError):
            _write(self.path.with_suffix(".answer"), seal(Answer.__name__, FORMAT, asdict(Answer(accepted, reason))))
        self.path.unlink(missing_ok=True)


class Requests:
    """The requests to one run, as its agents see them.

    Args:
        run_folder: folder of the run.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER_NAME
        self._warned = False

    def take(self, concerns_us: Callable[[Request], bool] = lambda _: True) -> list[TakenRequest]:
        """Take the requests that no other agent has taken, oldest first.

        Args:
            concerns_us: whether this agent can carry out a request; all others are left for other agents.
        """
        try:
            names = sorted(entry for entry in os.listdir(self._folder) if entry.endswith(".request"))
            if names:
                require_private(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn(str(error))
            return []
        return [taken for name in names if (taken := self._take(self._folder / name, concerns_us)) is not None]

    def _take(self, path: Path, concerns_us: Callable[[Request], bool]) -> TakenRequest | None:
        try:
            request = _read_request(path)
            if not concerns_us(request):
                return None
            return TakenRequest(request, path.rename(path.with_suffix(".taken")))
        except FileNotFoundError:
            return None
        except (OSError, schema.SchemaError) as error:
            self._warn(f"{path}: {error}")
            return None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("ignoring requests to this run: %s", reason)


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, readable by this user only."""
    partial = path.with_name(f".{path.name}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
    partial.rename(path)


def _read_request(path: Path) -> Request:
    data = _bytes_of(path)
    fields = parse(data)
    kind = schema.one_of(*_BY_NAME)(fields.get("kind") if isinstance(fields, dict) else None, "kind")
    return unseal(data, kind, FORMAT, _BY_NAME[kind])  # type: ignore[no-any-return]


def _read_answer(path: Path) -> Answer:
    return unseal(_bytes_of(path), Answer.__name__, FORMAT, _ANSWER)  # type: ignore[no-any-return]


def _bytes_of(path: Path) -> bytes:
    require_private(path)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read(_MOST_BYTES)
