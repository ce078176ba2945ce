"""Relays the output of workers to `sys.stdout` and `sys.stderr` of this process if those are not files.

In a notebook these are objects that send what is printed to the browser, while file descriptors 1 and 2 may lead to the
server's terminal, which no user reads. Workers print into pipes, and a thread here writes what it reads from them to
the running cell.
"""

from __future__ import annotations

import codecs
import contextvars
import os
import selectors
import sys
import threading
from types import TracebackType
from typing import Any, Self

_STREAMS = {1: "stdout", 2: "stderr"}
_CHUNK_BYTES = 65536


class OutputRelay:
    """A context in which the output of workers is relayed.

    Attributes:
        output: the file descriptors that workers use, by the ones of this process that they replace.
    """

    def __init__(self) -> None:
        self.output: dict[int, int] = {}
        self._sources: dict[int, Any] = {}
        self._end = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        for number, name in _STREAMS.items():
            stream = getattr(sys, name)
            if stream is not None and stream is not getattr(sys, f"__{name}__"):
                source, self.output[number] = os.pipe()
                self._sources[source] = stream
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        # In the caller's context, by which a notebook assigns the output to a cell.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._relay,), name="ckptless-output-relay", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._thread is not None
        # A process left behind by a worker may hold an end of a pipe, so its closing is not waited for.
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for number in (self._end, *self._sources, *self.output.values()):
            os.close(number)

    def _relay(self) -> None:
        decoders = {source: codecs.getincrementaldecoder("utf-8")("replace") for source in self._sources}
        with selectors.DefaultSelector() as selector:
            for number in (self._end, *self._sources):
                selector.register(number, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                for source in ready - {self._end}:
                    stream = self._sources[source]
                    stream.write(decoders[source].decode(os.read(source, _CHUNK_BYTES)))
                    stream.flush()
                if ready == {self._end}:
                    return
