"""How the program of a worker has failed: left for its agent by the interpreter that reports it.

An exit code does not say whether the program raised something of its own or was brought down by the loss of a peer,
and a process that has reported an exception may still not end: a thread of the program's, or a process that it has
started, keeps the interpreter waiting. The agent gives such a process some time, and then ends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_ckptless import environment

_LONGEST_ERROR = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """What a program has raised.

    Args:
        error: its type and message, in one line.
        is_of_lost_peer: whether it says that another rank is gone.
    """

    error: str
    is_of_lost_peer: bool = False


def leave_failure(error: BaseException, env: Mapping[str, str] = os.environ) -> None:
    """Tell the agent of this worker what its program has raised; nothing where no agent of ours has started it."""
    folder = env.get(environment.VERDICT_DIR)
    if not folder:
        return
    text = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    failure = Failure(" ".join(text.split())[:_LONGEST_ERROR], _is_of_lost_peer(error))
    path = Path(folder, f"failure-{os.getpid()}.json")
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(asdict(failure)))
    draft.rename(path)


def _is_of_lost_peer(error: BaseException) -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    from lightning_ckptless.membership.peers import is_lost_peer  # noqa: PLC0415 - brings torch, which is here already

    return is_lost_peer(error)


def is_reported_already(error: BaseException, env: Mapping[str, str] = os.environ) -> bool:
    """Whether another worker of this agent has reported the same traceback before; notes it where none has."""
    folder = env.get(environment.VERDICT_DIR)
    if not folder:
        return False
    text = "".join(traceback.format_exception(error))
    mark = Path(folder, f"reported-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def failure_of(folder: Path, pid: int) -> Failure | None:
    """What the program of a process has raised; None where it has reported nothing."""
    try:
        return Failure(**json.loads((folder / f"failure-{pid}.json").read_text()))
    except FileNotFoundError:
        return None
