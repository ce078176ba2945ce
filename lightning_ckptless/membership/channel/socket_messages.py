"""JSON messages with open files, over a local socket: between an agent and its workers or its fork server."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_LENGTH = struct.Struct("!I")
_MAX_FILES = 8

Message = dict[str, Any]


def send(sock: socket.socket, message: Message, files: Sequence[int] = ()) -> None:
    """Send one message, with copies of open files.

    Args:
        sock: a blocking AF_UNIX stream socket.
        message: any JSON object.
        files: at most 8 file descriptors; the receiver gets its own duplicates.

    Raises:
        OSError: the other end has closed.
    """
    body = json.dumps(message).encode()
    socket.send_fds(sock, [_LENGTH.pack(len(body))], files)
    sock.sendall(body)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Wait for the next message; None when the other end has closed.

    Returns:
        The message and the file descriptors that came with it, not inheritable, owned by the caller.
    """
    files: list[int] = []
    try:
        head, files, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
        (length,) = _LENGTH.unpack(head + _exactly(sock, _LENGTH.size - len(head)))
        message: Message = json.loads(_exactly(sock, length))
    except (EOFError, ConnectionResetError):
        # A reset means that the other side has closed with unread data.
        close_all(files)
        return None
    return message, files


def hang_up(sock: socket.socket) -> None:
    """End a connection, and close this process's descriptor of it.

    Closing alone would not be visible at the other end as long as another process, e.g. one forked by a user's script,
    holds a duplicate.
    """
    with suppress(OSError):
        # The other end has closed first.
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def close_all(files: Sequence[int]) -> None:
    """Close every file descriptor of a list."""
    for file in files:
        os.close(file)


def _exactly(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(count - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
