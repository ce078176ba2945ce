"""The process of a durable writer: `python -m lightning_ckptless.durable SETTINGS [--detach]`."""

from __future__ import annotations

import os
import sys

NICENESS = 10


def main(arguments: list[str]) -> None:
    """Run a durable writer.

    Args:
        arguments: the settings, and optionally `--detach` to write in a background process and return at once.
    """
    # Lower the priority and detach before the import of torch, which takes seconds of CPU time: training has priority,
    # and the process that starts a detached writer waits for this one.
    os.nice(NICENESS)
    if "--detach" in arguments and os.fork() != 0:
        os._exit(0)
    from lightning_ckptless.durable.writer import run  # noqa: PLC0415
    from lightning_ckptless.durable.writer_settings import WriterSettings  # noqa: PLC0415

    run(WriterSettings.from_text(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
