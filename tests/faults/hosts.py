"""Two hosts in network namespaces of their own, and a link between them that can be cut.

A cut link loses packets and resets nothing: each host sends to a station that does not exist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_NOWHERE = "02:00:00:00:00:99"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """The hosts.

    Args:
        names: of their namespaces.
    """

    names: tuple[str, str]

    @property
    def env(self) -> dict[str, str]:
        """What processes on them are told: which network gloo is to use."""
        return {"GLOO_SOCKET_IFNAME": "wire"}

    def within(self, host: int) -> list[str]:
        """The command that runs another one on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self) -> None:
        """Lose every packet between them from now on."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neigh", "replace", other, "lladdr", _NOWHERE, "dev", "wire", "nud", "permanent")

    def mend(self) -> None:
        """Let packets arrive again."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neigh", "del", other, "dev", "wire")


def make_hosts(stack: ExitStack) -> Hosts:
    """Two hosts, until the stack is closed; skips the test where this machine has none to give."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: there is no `ip` to make network namespaces with")
    names = (f"ckptless-{os.getpid()}-a", f"ckptless-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces on this machine (root is needed): {error.stderr.strip()}")
    return Hosts(names)
