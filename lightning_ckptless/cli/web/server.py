"""Serves a run over HTTP: a page, its content, its status as JSON, and its metrics. Nothing can be changed by it."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from types import TracebackType
from typing import Self

from lightning_ckptless.cli.survey.reader import RunReader
from lightning_ckptless.cli.survey.survey import Survey, as_json, survey_of
from lightning_ckptless.cli.view.metrics import CONTENT_TYPE, metrics_text
from lightning_ckptless.cli.view.watch_page import content, watch_page
from lightning_ckptless.cli.web.heatmap import Heatmap
from lightning_ckptless.errors import OptionsError

_HTML = "text/html; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page loads nothing but its own content, and no other page may embed it."""


class WatchedRun:
    """A run that one thread looks at, and others show.

    Args:
        reader: reads the run.
    """

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._heat = Heatmap()
        self._reading = reader.read()
        self._found = survey_of(self._reading)

    def look(self) -> Survey:
        """Read the run again."""
        with self._lock:
            self._reading = self._reader.read()
            self._found = survey_of(self._reading)
            self._heat.add(self._found.members)
            return self._found

    def answer(self, path: str) -> tuple[str, str] | None:
        """Return content type and content for a path; None if there is nothing."""
        with self._lock:
            match path:
                case "/":
                    return _HTML, watch_page(self._found, self._reading.history, self._heat)
                case "/content":
                    return _HTML, content(self._found, self._reading.history, self._heat)
                case "/status.json":
                    return "application/json", as_json(self._found)
                case "/metrics":
                    return CONTENT_TYPE, metrics_text(self._found)
                case _:
                    return None


def is_loopback(host: str) -> bool:
    """Whether a host, as `--host` or a browser has it, is this machine's loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class WatchServer:
    """Serves a run, as a context manager.

    Args:
        run: the run.
        host: address to listen on.
        port: port to listen on; 0 for a free one.

    Attributes:
        url: address of the page.

    Raises:
        OptionsError: it cannot listen there.
    """

    def __init__(self, run: WatchedRun, host: str, port: int) -> None:
        handler = _handler(run, requires_loopback=is_loopback(host))
        kind = _SixServer if ":" in host else ThreadingHTTPServer
        try:
            self._server = kind((host, port), handler)
        except (OSError, OverflowError) as error:
            raise OptionsError(
                f"--host {host} --port {port}: cannot listen there ({error}): choose another port, or 0 for a free one"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="ckptless-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _SixServer(ThreadingHTTPServer):
    address_family = AF_INET6


def _handler(run: WatchedRun, *, requires_loopback: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET and HEAD."""

        timeout = 10

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            if requires_loopback and not is_loopback(self._host):
                # A page of another site, whose name was made to resolve to this machine, must not read the run.
                self.send_error(HTTPStatus.FORBIDDEN, "Open the page by its address or as localhost")
                return
            found = run.answer(self.path.partition("?")[0])
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, text = found
            body = text.encode()
            self.send_response(HTTPStatus.OK)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **_HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        @property
        def _host(self) -> str:
            """The host that the client has asked for, without the port."""
            host = self.headers.get("Host", "")
            return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Log nothing: the page asks twice a second."""

    return Handler


def serve(
    run: WatchedRun,
    server: WatchServer,
    pause_s: Callable[[float], float],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Look at a run and serve it until Ctrl-C is pressed.

    Args:
        run: the run.
        server: serves it.
        pause_s: returns the time until the next look in seconds, given the CPU time of the last one.
        wait: waits for a time in seconds.
    """
    try:
        with server:
            while True:
                began_s = time.thread_time()
                run.look()
                wait(pause_s(time.thread_time() - began_s))
    except KeyboardInterrupt:
        return
