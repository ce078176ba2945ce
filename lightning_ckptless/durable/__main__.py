"""The process of a durable writer: `python -m lightning_ckptless.durable ORDER [--detach]`."""

from __future__ import annotations

import os
import sys

NICENESS = 10


def main(arguments: list[str]) -> None:
    """Write durable states as ordered.

    Args:
        arguments: the order, and `--detach` to let this process end at once and write in one of its own.
    """
    # Before torch is imported, which takes seconds of a core: training comes first, and whoever has started a detached
    # writer waits for this process.
    os.nice(NICENESS)
    if "--detach" in arguments and os.fork() != 0:
        os._exit(0)
    from lightning_ckptless.durable.order import WriterOrder  # noqa: PLC0415
    from lightning_ckptless.durable.writer import run  # noqa: PLC0415

    run(WriterOrder.from_text(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
