"""Failover from one rendezvous endpoint of a run to the next."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.torch_internals import is_this_machine
from lightning_ckptless.protocol.rendezvous_failover import RendezvousEndpoint, choose_endpoint

_ANSWER_S = 0.5


class RendezvousFailover:
    """The rendezvous endpoints of a run, as one node sees them.

    Args:
        endpoints: `host:port` of each, in the order that all nodes share.
        local_addr: address of this node; None to look it up.

    Raises:
        OptionsError: an endpoint is no `host:port`.
    """

    def __init__(self, endpoints: Sequence[str], local_addr: str | None) -> None:
        self.endpoints = tuple(endpoints)
        self._addresses = [_address(endpoint) for endpoint in endpoints]
        self._own = self._find_own(local_addr)
        self._lost: int | None = None

    def _find_own(self, local_addr: str | None) -> int | None:
        for index, (host, _) in enumerate(self._addresses):
            if host == local_addr or (local_addr is None and is_this_machine(host)):
                return index
        return None

    def next(self, lost: RendezvousEndpoint | None = None) -> RendezvousEndpoint:
        """Return where to rendezvous now.

        Args:
            lost: the endpoint that was lost; None at the start.
        """
        if lost is not None:
            self._lost = lost.index
        answering = [index for index in range(len(self.endpoints)) if index != self._own and self._answers(index)]
        return choose_endpoint(self.endpoints, own=self._own, answering=answering, lost=self._lost)

    def _answers(self, index: int) -> bool:
        try:
            with socket.create_connection(self._addresses[index], timeout=_ANSWER_S):
                return True
        except OSError:
            return False


def _address(endpoint: str) -> tuple[str, int]:
    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdigit():
        raise OptionsError(f"rdzv_endpoint {endpoint!r}: expected HOST:PORT, or several of them separated by commas")
    return host.strip("[]"), int(port)
