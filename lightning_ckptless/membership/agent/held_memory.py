"""Memory that the agent holds for its workers, so that its contents outlive them.

A worker asks over its channel for files of anonymous memory (`memory_files`) at given paths. The agent creates them and
keeps them open until their links are removed, or until it ends.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.membership.channel.agent_channel import AgentChannel, FromWorker
from lightning_ckptless.membership.events import MemoryHolderChosen, Report
from lightning_ckptless.protocol.messages import HoldMemory, MemoryHeld
from lightning_ckptless.system.memory_files import is_memory_file, make_memory_file

_ANSWER_WITHIN_S = 120.0
"""An agent that takes longer to answer is suspended or stuck."""
_RELEASE_EVERY_S = 1.0


class HeldMemory:
    """The memory that one agent process holds, over all rounds and all rendezvous.

    Args:
        node: its name.
        report: receives events.
    """

    def __init__(self, node: str, report: Report) -> None:
        self._node = node
        self._report = report
        self._handles: dict[Path, int] = {}
        self._has_reported = False
        self._released_at = time.monotonic()

    def maintain(self, received: Sequence[FromWorker]) -> None:
        """Create the files that workers request, and release those whose links have been removed.

        Args:
            received: messages from workers.
        """
        for _, message, files in received:
            if isinstance(message, HoldMemory):
                self._answer(message, files)
        if time.monotonic() - self._released_at > _RELEASE_EVERY_S:
            self._release()

    def close(self) -> None:
        """Release all memory."""
        socket_messages.close_all(list(self._handles.values()))
        self._handles.clear()

    def _answer(self, message: HoldMemory, files: Sequence[int]) -> None:
        with socket.socket(fileno=files[0]) as asker:
            try:
                self._make([Path(path) for path in message.paths])
            except OSError as error:
                refusal = str(error)
            else:
                refusal = ""
            AgentChannel(asker).send(MemoryHeld(refusal))
        if not refusal and not self._has_reported:
            self._has_reported = True
            self._report(MemoryHolderChosen(self._node, os.getpid(), message.reason))

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


def request_memory(channel: AgentChannel, paths: Sequence[Path], reason: str) -> None:
    """Have the agent create files of anonymous memory, and wait until they exist.

    Args:
        channel: to the agent.
        paths: paths of the files.
        reason: why regular files cannot be used, for the user.

    Raises:
        ArenaError: the agent cannot make them, or does not answer.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            channel.send(HoldMemory([str(path.absolute()) for path in paths], reason), [theirs.fileno()])
        ours.settimeout(_ANSWER_WITHIN_S)
        answer = AgentChannel(ours).receive()
    if answer is not None and isinstance(answer.message, MemoryHeld):
        refusal = answer.message.refusal
    else:
        refusal = f"it has exited, or has not answered within {_ANSWER_WITHIN_S:.0f} s"
    if refusal:
        raise ArenaError(f"{paths[0].parent}: the agent cannot hold {len(paths)} slots in anonymous memory: {refusal}")
