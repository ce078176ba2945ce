"""How a worker's script failed: left for its agent by the interpreter that reports the exception.

An exit code does not tell whether the script raised its own error or failed because a peer was lost. Moreover, a
process that has reported an exception may not exit, because the interpreter waits for a thread or child process of the
script. The agent gives such a process some time and then kills it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning_ckptless
from lightning_ckptless import environment

_LONGEST_ERROR = 300
_LONGEST_OUTLINE = 1000
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_OWN_FOLDER = Path(lightning_ckptless.__file__).parent


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception raised by a script.

    Args:
        error: its type and message, in one line.
        is_of_lost_peer: whether it means that another rank is lost.
    """

    error: str
    is_of_lost_peer: bool = False


def report_failure(error: BaseException, env: Mapping[str, str] = os.environ) -> None:
    """Report the script's exception to the agent of this worker; does nothing without one of our agents."""
    folder = env.get(environment.AGENT_DIR)
    if not folder:
        return
    text = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    failure = Failure(" ".join(text.split())[:_LONGEST_ERROR], is_of_lost_peer(error))
    path = Path(folder, f"failure-{os.getpid()}.json")
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(asdict(failure)))
    draft.rename(path)


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether an exception of a script means that another rank is lost."""
    if "torch.distributed" not in sys.modules:
        return False
    from lightning_ckptless.membership.worker.peer_errors import is_lost_peer  # noqa: PLC0415 - brings torch, which is here already

    return is_lost_peer(error)


def count_report(error: BaseException, output: int, env: Mapping[str, str] = os.environ) -> int:
    """Count the reports of a traceback; returns the number so far, including this one.

    Two tracebacks are the same if they differ only in numbers in their messages, e.g. a port or a rank. Reports to
    different files are counted separately: a reader of one log file does not see the other.

    Args:
        error: about to be reported.
        output: file descriptor that the report goes to.
        env: environment of this worker.
    """
    folder = env.get(environment.AGENT_DIR)
    if not folder:
        return 1
    place = os.fstat(output)
    key = repr((place.st_dev, place.st_ino, *_outline(error)))
    path = Path(folder, f"reported-{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:16]}")
    # One byte per report, so that two workers that append simultaneously get different counts.
    with path.open("ab", buffering=0) as file:
        file.write(b".")
        return file.tell()


def without_numbers(text: str) -> str:
    """Replace the numbers in a text, so that two reports of the same fault become equal."""
    return _NUMBER.sub("#", text)


def _outline(error: BaseException) -> list[str]:
    """Return what identifies a traceback: types, messages without numbers, and lines of code outside this package."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(found) < _LONGEST_OUTLINE:
        found.append(without_numbers(f"{type(cause).__name__}: {cause}"))
        frames = traceback.extract_tb(cause.__traceback__)
        found += [f"{f.filename}:{f.lineno}" for f in frames if not Path(f.filename).is_relative_to(_OWN_FOLDER)]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found


def failure_of(folder: Path, pid: int) -> Failure | None:
    """Return the reported exception of a process's script; None if there is none."""
    try:
        return Failure(**json.loads((folder / f"failure-{pid}.json").read_text()))
    except FileNotFoundError:
        return None
