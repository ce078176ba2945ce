"""The sidecar that checks the health of a node during training: `python -m ...health_watch SETTINGS`.

It runs the same check as a worker before it joins the others, but only on the CPU, since another process on an
accelerator would take some of its memory. It has the lowest priority and one thread. A check that does not return
counts as failed: a node whose disk or network does not respond is unfit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.membership.channel.agent_channel import AgentChannel, open_channel
from lightning_ckptless.protocol.messages import NodeUnfit
from lightning_ckptless.trainer.session.health_check import find_unfit

MODULE = "lightning_ckptless.trainer.session.health_watch"
NICENESS = 19
LONGEST_S = 300.0
"""A check that has not returned after this time counts as failed."""


@dataclass(frozen=True, slots=True)
class HealthWatchSettings:
    """What is checked and how often.

    Args:
        check: dotted name of the user's function; empty for none.
        path: folder from which its module is imported; empty without a function.
        every_s: seconds between two checks.
    """

    check: str
    path: str
    every_s: float

    @classmethod
    def of(cls, check: str, every_s: float) -> HealthWatchSettings:
        """Return the settings for a function that this process can import."""
        return cls(check, _folder_of(check), every_s)

    def to_text(self) -> str:
        """Serialize the settings."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> HealthWatchSettings:
        """Parse the result of `to_text`."""
        return cls(**json.loads(text))


def _folder_of(check: str) -> str:
    """Return the folder that contains a function's module or package, which other processes may not search."""
    package: Any = import_module(check.partition(".")[0]) if check else None
    file = getattr(package, "__file__", None)
    if file is None:
        return ""
    return str(Path(file).parent.parent if hasattr(package, "__path__") else Path(file).parent)


def watch(settings: HealthWatchSettings, channel: AgentChannel, over: threading.Event) -> None:
    """Check periodically, and notify the agent of each check that fails.

    Args:
        settings: what is checked, and how often.
        channel: to the agent.
        over: set when no further check is wanted.
    """
    while not over.wait(settings.every_s):
        if finding := _in_time(settings.check, LONGEST_S):
            channel.send(NodeUnfit(finding))


def _in_time(check: str, longest_s: float) -> str:
    """Return the problem of this node; empty if there is none."""
    found: list[str] = []
    checking = threading.Thread(target=lambda: found.append(find_unfit(torch.device("cpu"), check)), daemon=True)
    checking.start()
    checking.join(longest_s)
    if checking.is_alive():
        return f"{check or 'the check'} has not returned for {longest_s:.0f} s"
    # A thread that raised has printed why: the options are wrong, but the node may be fit.
    return found[0] if found else ""


def main(arguments: list[str]) -> None:
    """Run the sidecar.

    Args:
        arguments: the settings.
    """
    os.nice(NICENESS)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Exit at once, even during a check: nothing must be kept.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    channel, settings = open_channel(), HealthWatchSettings.from_text(arguments[0])
    assert channel is not None, "a sidecar has a channel to its agent"
    if settings.path:
        sys.path.insert(0, settings.path)
    watch(settings, channel, threading.Event())


if __name__ == "__main__":
    main(sys.argv[1:])
