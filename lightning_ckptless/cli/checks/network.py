"""Checks how ranks connect: the name of this host, name resolution, and the interfaces set for gloo and NCCL."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from lightning_ckptless.cli.checks.check import Check, Job, Status

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
_ATTEMPTS = 3
_MOST_S = 12.0
_SLOW_S = 0.5
"""By default a lost DNS query is repeated after 5 s; an answered one takes a few milliseconds."""


@dataclass(frozen=True, slots=True)
class HostName:
    """The result of resolving the name of this host.

    Args:
        name: host name.
        addresses: addresses that it resolves to; empty if it does not resolve.
        longest_s: duration of the slowest look-up in seconds, reverse look-ups included.
        problem: why the name does not resolve; empty if it does.
    """

    name: str
    addresses: tuple[str, ...]
    longest_s: float
    problem: str = ""


def look_up(name: str, resolve: Callable[[str], tuple[str, ...]] | None = None, limit_s: float = _MOST_S) -> HostName:
    """Resolve a name and its addresses several times, since DNS queries are lost now and then.

    Args:
        name: host name.
        resolve: returns the addresses of a name, after a reverse look-up of each.
        limit_s: time limit for all look-ups, in seconds.
    """
    answers: list[tuple[float, tuple[str, ...], str]] = []

    def ask() -> None:
        for _ in range(_ATTEMPTS):
            began = time.monotonic()
            addresses: tuple[str, ...] = ()
            problem = ""
            try:
                addresses = (resolve or _resolve)(name)
            except OSError as error:
                problem = str(error)
            answers.append((time.monotonic() - began, addresses, problem))

    # A look-up cannot be interrupted. One that exceeds the limit continues in its daemon thread.
    thread = threading.Thread(target=ask, name="look-up", daemon=True)
    thread.start()
    thread.join(limit_s)
    known = tuple(answers)
    if thread.is_alive():
        known = (*known, (limit_s, (), f"no answer within {limit_s:g} s"))
    found = next((addresses for _, addresses, _ in known if addresses), ())
    problem = "" if found else known[-1][2]
    return HostName(name, found, max(took_s for took_s, _, _ in known), problem)


def _resolve(name: str) -> tuple[str, ...]:
    addresses = sorted({str(facts[4][0]) for facts in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    for address in (*addresses, "127.0.0.1"):
        # The result does not matter, only how long it takes.
        socket.getfqdn(address)
    return tuple(addresses)


def check_host_name(job: Job, host: HostName, env: Mapping[str, str]) -> Check:
    """Check that the name of this host resolves to an address that other ranks can reach."""
    expected = "an address" if job.nodes == 1 else "an address that the other nodes can reach"
    found = f"{host.name}: {', '.join(host.addresses) or host.problem}"
    if not host.addresses:
        status = Status.WARNING if job.nodes == 1 else Status.FAILURE
        return Check("host name", status, found, expected, f"add a line `ADDRESS {host.name}` to /etc/hosts")
    only_here = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in host.addresses)
    if job.nodes > 1 and only_here and GLOO_INTERFACE not in env:
        fix = f"set {GLOO_INTERFACE} to the interface between the nodes, or correct the name's line in /etc/hosts"
        return Check("host name", Status.FAILURE, f"{found}, reachable from this host only", expected, fix)
    return Check("host name", Status.OK, found, expected)


def check_look_up_time(host: HostName) -> Check:
    """Check that the resolver answers quickly every time."""
    found = f"{host.longest_s * 1000:.0f} ms at most in {_ATTEMPTS} attempts, reverse look-ups included"
    expected = f"less than {_SLOW_S * 1000:.0f} ms: a lost DNS query delays a connection by 5 s"
    if host.longest_s < _SLOW_S:
        return Check("name look-up", Status.OK, found, expected)
    fix = "add the nodes to /etc/hosts, or `options timeout:1 attempts:2` to /etc/resolv.conf"
    return Check("name look-up", Status.WARNING, found, expected, fix)


def check_interface(job: Job, variable: str, value: str | None, interfaces: Mapping[str, bool]) -> Check:
    """Check that a variable names interfaces that exist, are up, and reach the other nodes.

    Args:
        job: job to be trained.
        variable: `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME`.
        value: value of the variable; None if unset.
        interfaces: interfaces of this host, and whether each is up.
    """
    expected = f"unset, or one of {', '.join(sorted(name for name, up in interfaces.items() if up)) or 'none'}"
    if not value:
        return Check(variable, Status.OK, "unset", expected)
    chosen = [name for name in interfaces if _chooses(variable, value, name)]
    fix = f"unset {variable}, or name an interface that is up"
    wrong = Status.WARNING if variable == NCCL_INTERFACE and not job.has_gpu else Status.FAILURE
    if not any(interfaces[name] for name in chosen):
        found = f"{value}: {'interface is down' if chosen else 'no such interface'}"
        return Check(variable, wrong, found, expected, fix)
    if job.nodes > 1 and set(chosen) == {"lo"}:
        return Check(variable, wrong, f"{value}: reaches this host only", expected, fix)
    return Check(variable, Status.OK, value, expected)


def _chooses(variable: str, value: str, interface: str) -> bool:
    """Return whether the value of a variable selects an interface.

    Gloo takes names. NCCL takes prefixes of names; `=` requests exact names, `^` excludes what follows.
    """
    if variable == GLOO_INTERFACE:
        return interface in value.split(",")
    names = value.removeprefix("^").removeprefix("=").split(",")
    is_exact = value.removeprefix("^").startswith("=")
    is_named = any(interface == name if is_exact else interface.startswith(name) for name in names if name)
    return is_named is not value.startswith("^")


def check_network(job: Job, env: Mapping[str, str]) -> list[Check]:
    """Run all network checks on this host."""
    host = look_up(socket.gethostname())
    interfaces = {name: facts.isup for name, facts in psutil.net_if_stats().items()}
    return [
        check_host_name(job, host, env),
        check_look_up_time(host),
        *(check_interface(job, name, env.get(name), interfaces) for name in (GLOO_INTERFACE, NCCL_INTERFACE)),
    ]
