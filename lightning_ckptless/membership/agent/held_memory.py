"""Memory that the agent holds for its workers: what a worker puts there outlives the worker.

A worker asks over its line for files of anonymous memory (`memory_files`) at given paths. The agent makes them and
keeps them open until their links are removed, or until it ends.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.membership.channel.agent_channel import Line
from lightning_ckptless.membership.channel.socket_messages import Message
from lightning_ckptless.system.memory_files import is_memory_file, make_memory_file

_ANSWER_WITHIN_S = 120.0
"""An agent that does not answer for so long is stopped or stuck."""
_RELEASE_EVERY_S = 1.0


class HeldMemory:
    """The memory that one agent process holds, through all its rounds and rendezvous.

    Args:
        node: its name.
        record: receives events, as `record(event, **fields)`.
        say: prints a message for the user.
    """

    def __init__(self, node: str, record: Callable[..., None], say: Callable[[str], None]) -> None:
        self._node = node
        self._record = record
        self._say = say
        self._handles: dict[Path, int] = {}
        self._has_said = False
        self._released_at = time.monotonic()

    def tend(self, said: Sequence[tuple[int, Message]]) -> None:
        """Make what workers ask for, and release what no link leads to any more.

        Args:
            said: what workers have said.
        """
        for _, message in said:
            if message["kind"] == "memory":
                self._answer(message)
        if time.monotonic() - self._released_at > _RELEASE_EVERY_S:
            self._release()

    def close(self) -> None:
        """Release all of it."""
        socket_messages.close_all(list(self._handles.values()))
        self._handles.clear()

    def _answer(self, message: Message) -> None:
        with socket.socket(fileno=message["files"][0]) as asker:
            try:
                self._make([Path(path) for path in message["paths"]])
            except OSError as error:
                refusal = str(error)
            else:
                refusal = ""
            # A worker that has died meanwhile shows elsewhere.
            Line(asker).tell("memory", refusal=refusal)
        if not refusal and not self._has_said:
            self._has_said = True
            self._record("memory_held", node=self._node, pid=os.getpid(), reason=message["reason"])
            self._say(message["reason"])

    def _make(self, paths: Sequence[Path]) -> None:
        self._release()
        for path in paths:
            handle = make_memory_file(path)
            if path in self._handles:
                os.close(self._handles[path])
            self._handles[path] = handle

    def _release(self) -> None:
        self._released_at = time.monotonic()
        for path in [path for path in self._handles if not is_memory_file(path)]:
            os.close(self._handles.pop(path))


def have_held(line: Line, paths: Sequence[Path], reason: str) -> None:
    """Have the agent make files of anonymous memory, and wait until they are there.

    Args:
        line: to the agent.
        paths: of the files.
        reason: why files proper cannot be had, for the user.

    Raises:
        ArenaError: the agent cannot make them, or does not answer.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            line.tell("memory", [theirs.fileno()], paths=[str(path.absolute()) for path in paths], reason=reason)
        ours.settimeout(_ANSWER_WITHIN_S)
        answer = Line(ours).receive()
    if answer is None:
        refusal = f"it has ended, or has not answered within {_ANSWER_WITHIN_S:.0f} s"
    else:
        refusal = answer[0]["refusal"]
    if refusal:
        raise ArenaError(f"{paths[0].parent}: the agent cannot hold {len(paths)} slots in anonymous memory: {refusal}")
