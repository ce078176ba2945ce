"""Two hosts, each in its own network namespace, with a link between them that can be cut.

A cut link drops packets without resetting connections: each host sends to a MAC address that does not exist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_UNUSED_MAC = "02:00:00:00:00:99"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Two connected hosts.

    Args:
        names: names of the network namespaces.
    """

    names: tuple[str, str]

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for processes on the hosts: the network interface for gloo."""
        return {"GLOO_SOCKET_IFNAME": "wire"}

    def within(self, host: int) -> list[str]:
        """Return the command prefix that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self) -> None:
        """Drop all packets between the hosts."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neigh", "replace", other, "lladdr", _UNUSED_MAC, "dev", "wire", "nud", "permanent")

    def restore(self) -> None:
        """Restore the link."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neigh", "del", other, "dev", "wire")


def make_hosts(stack: ExitStack) -> Hosts:
    """Create two hosts that exist until the stack is closed; skip the test if this machine does not allow it."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: `ip` is needed to create network namespaces")
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
        pytest.skip(f"cannot create network namespaces (needs root): {error.stderr.strip()}")
    return Hosts(names)
