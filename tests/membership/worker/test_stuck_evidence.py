"""A process describes its sockets with their contents, and each thread with its place."""

from __future__ import annotations

import socket
import threading

import pytest

from lightning_ckptless.membership.worker.stuck_evidence import evidence


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_sockets_are_described_with_their_contents(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as one, listener.accept()[0]:
            one.sendall(b"abc")
            lines = evidence()["sockets"]
    assert any(f"{host}:{port} -> " in line and " LISTEN, " in line for line in lines)
    (accepted,) = (line for line in lines if f"{host}:{port} -> {host}:" in line)
    assert " ESTABLISHED, 0 " in accepted and accepted.endswith(" 3 not read")


def test_a_thread_is_described_with_its_state_and_place() -> None:
    entered, leave = threading.Event(), threading.Event()

    def waits() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=waits, name="the-waiting-one")
    thread.start()
    try:
        assert entered.wait(10)
        (line,) = (line for line in evidence()["threads"] if "the-waiting-one in " in line)
    finally:
        leave.set()
        thread.join()
    assert line.startswith(f"{thread.native_id} ")
    assert f"{__name__}.waits:" in line
