"""The agent as a process: `python -m lightning_ckptless.membership [options] script [arguments]`."""

from __future__ import annotations

import sys

from lightning_ckptless.membership.launch.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
