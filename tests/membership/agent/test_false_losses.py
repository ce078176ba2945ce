"""Agents whose connections are closed while all cores are busy consider no node lost that lives."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.agent.node_liveness import Heartbeat
from lightning_ckptless.membership.worker.connections import abort_connections_to
from lightning_ckptless.protocol.node_liveness import AllAlive, Bound, watched_by
from tests.busy_cores import busy_cores

NODES, ROUNDS, HOST = 3, 2, "127.0.0.1"
ROUND_S = 10.0
CLOSE_AFTER_S = 6.0
"""Time for a node to know its longest pause between heartbeats."""
LOOK_S = 0.02
BOUND = Bound(2.0, 3)
"""The defaults of `ckptless run`."""


def agent(node: int, port: int) -> list[tuple[int, list[str]]]:
    """Exchange heartbeats as one of the agents; returns the closed connections and the losses of each round."""
    store, found = TCPStore(HOST, port, is_master=False), []
    heartbeat = Heartbeat(BOUND, HOST)
    for number in range(ROUNDS):
        of_round = PrefixStore(f"round-{number}", store)
        heartbeat.begin_round(of_round, node=node, nodes=NODES, place=(HOST, port), worker_store=(HOST, 1))
        found.append(watch(heartbeat, of_round, node))
        # No agent ends its round before all have seen the end of theirs.
        of_round.set(f"done/{node}", "1")
        of_round.wait([f"done/{other}" for other in range(NODES)])
    heartbeat.leave()
    heartbeat.close()
    return found


def watch(heartbeat: Heartbeat, store: Any, node: int) -> tuple[int, list[str]]:
    """Close this agent's connections to others in the middle of a round, as a firewall would."""
    began, closed, reasons, pause = time.monotonic(), 0, list[str](), threading.Event()
    while (passed_s := time.monotonic() - began) < ROUND_S:
        if not closed and passed_s > CLOSE_AFTER_S:
            keys = [f"ckptless/heartbeat/{other}/address" for other in watched_by(node, NODES)]
            closed = abort_connections_to([(HOST, int(store.get(key).decode().split()[1])) for key in keys])
        if not isinstance(found := heartbeat.finding, AllAlive) and not reasons:
            reasons.append(found.reason)
        pause.wait(LOOK_S)
    return closed, reasons


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_agent_is_considered_lost_while_all_cores_are_busy() -> None:
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with busy_cores(2 * (os.cpu_count() or 1)), ProcessPoolExecutor(NODES, mp_context=get_context("spawn")) as agents:
        rounds = [found for of_agent in agents.map(agent, range(NODES), [store.port] * NODES) for found in of_agent]
    assert len(rounds) == ROUNDS * NODES
    assert all(closed for closed, _ in rounds)
    assert [reasons for _, reasons in rounds] == [[]] * ROUNDS * NODES
