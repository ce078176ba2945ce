"""The page of a run, over HTTP: its elements, what it refuses, and how it looks to a real browser, if there is one."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.survey.members import Member
from lightning_ckptless.cli.survey.reader import RunReader
from lightning_ckptless.cli.survey.survey import survey_of
from lightning_ckptless.cli.view.watch_page import content
from lightning_ckptless.cli.web import server as web
from lightning_ckptless.cli.web.heatmap import Heatmap
from lightning_ckptless.cli.web.server import WatchedRun, WatchServer, is_loopback
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import LEDGER_NAME, Ledger
from lightning_ckptless.replica.arena import Arena, Owner
from tests.cli.ledgers import RUN_ID, write_ledger
from tests.cli.survey.readings import event, placed, reading, time_spent, worker
from tests.cli.test_status import fill
from tests.cli.test_watch import WATCHES
from tests.house.code import REPOSITORY

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
PNG = b"\x89PNG\r\n\x1a\n"


class Elements(HTMLParser):
    """The elements of a page: attributes by id, text by id, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link"}:
            self._open.append(dict(attrs).get("id") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in filter(None, self._open):
            self.text[name] = self.text.get(name, "") + data

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind that have some values."""
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def a_run() -> Any:
    """What is read of a run with a rank that lags, a recovery, and a name that must be escaped."""
    phases = {"detect_s": 0.1, "regroup_s": 0.3}
    spent = {"detect": 0.1, "regroup": 0.3, "training": 99.6}
    events = [
        placed(),
        *(event("committed", 60.0 - count, 0, step=count, of=100) for count in range(50)),
        event("recovery", 30.0, 0, rung="in place", cause="<b>died</b>", version="step 3", phases=phases, total_s=0.4),
        time_spent(0.0, **spent),
    ]
    return reading(events, workers=[worker(0), worker(1, own_s=0.2)])


def test_the_elements_of_the_page() -> None:
    run, heat = a_run(), Heatmap()
    found = survey_of(run)
    heat.add(found.members)
    page = Elements(content(found, run.history, heat))
    assert page.text["protected"].startswith("any 1 node may be lost; newest version step 7")
    assert page.text["state"] == "running"
    assert page.of("p", **{"class": "alarm", "data-kind": "straggler", "data-rank": "1"})
    assert page.text["alarms"].startswith("rank 1 takes 200.0 ms per step")
    assert len(page.of("tr", **{"class": "bad"})) == 1
    assert {cell["data-rank"] for cell in page.of("rect", **{"data-step": "8"})} == {"0", "1"}
    assert [found["data-bucket"] for found in page.of("li") if "data-bucket" in found] == [
        "training",
        "detect",
        "regroup",
    ]
    assert len(page.of("polyline")) == len(page.of("rect", **{"class": "recovery"})) == 1
    assert "<b>died</b>" in page.text["recoveries"]
    assert [found["title"] for found in page.of("span") if "title" in found] == ["detect: 100 ms", "regroup: 300 ms"]
    assert not page.of("b")


def test_a_run_of_which_nothing_is_known() -> None:
    run = reading(copies=(), hosted=())
    page = Elements(content(survey_of(run), run.history, Heatmap()))
    assert page.text["protected"] == "nothing is protected yet: no version has been mirrored"
    assert not page.of("svg")


def test_the_heatmap_has_a_column_per_step_and_keeps_the_slowest_ranks() -> None:
    def members(step: int) -> list[Member]:
        return [Member(rank, "a", rank, "running", step, "batch", 0.1, 0.01 * rank) for rank in range(5)]

    heat = Heatmap(most_columns=3)
    for step in (1, 1, 2, 3, 3, 4):
        heat.add(members(step))
    assert heat.steps == (2, 3, 4)
    assert [row.rank for row in heat.rows(most=2)] == [3, 4]
    assert [cell.step_s for cell in heat.rows()[2].cells if cell is not None] == [0.02] * 3


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The folder of all runs, with a run whose agent is this process."""
    arena = Arena.create(tmp_path / "shm", RUN_ID, "node-a", Owner.of(os.getpid()))
    for rank in (0, 1):
        fill(arena, shard=rank, holder=rank, committed=6, staged=7)
    write_ledger(tmp_path / "runs", arena=arena.path, ended=False)
    yield tmp_path / "runs"
    arena.close()


Get = Callable[..., tuple[int, dict[str, str], str]]


def getter(url: str) -> Get:
    """A function that asks a server for a path."""
    place = url.removeprefix("http://").rstrip("/")

    def get(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection(place, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    return get


@pytest.fixture
def served(root: Path) -> Iterator[tuple[WatchedRun, WatchServer]]:
    run = WatchedRun(RunReader(root / RUN_ID))
    with WatchServer(run, "127.0.0.1", 0) as server:
        yield run, server


def test_what_is_served(served: tuple[WatchedRun, WatchServer], root: Path) -> None:
    run, server = served
    get = getter(server.url)
    status, headers, page = get("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    elements = Elements(page)
    assert elements.text["state"] == "running"
    # Nothing is loaded from elsewhere.
    links = [value for _, found in elements.tags for name, value in found.items() if name in {"src", "href"}]
    assert links == ["data:,"]
    assert not re.search(r"https?://|url\(", page)
    Ledger(root / RUN_ID / LEDGER_NAME).record("committed", step=41, of=50)
    run.look()
    assert "41 of 50" in get("/content")[2]
    assert json.loads(get("/status.json")[2])["pace"]["step"] == 41
    status, headers, metrics = get("/metrics")
    assert "version=0.0.4" in headers["Content-Type"]
    assert "\nckptless_step 41.0\n" in metrics


def test_what_is_refused(served: tuple[WatchedRun, WatchServer]) -> None:
    get = getter(served[1].url)
    assert get("/../../etc/passwd")[0] == 404
    assert get("/", "POST")[0] == 501
    # As a page of another site would ask, whose name was made to resolve to this machine.
    assert get("/status.json", Host="rebound.example")[0] == 403
    assert get("/status.json", Host="localhost:1")[0] == get("/status.json", Host="[::1]:1")[0] == 200
    status, headers, body = get("/metrics", "HEAD")
    assert (status, body) == (200, "") and int(headers["Content-Length"]) > 100


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.1.2.3", True),
        ("0.0.0.0", False),
        ("x.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def watch(root: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["watch", RUN_ID, "--run-root", str(root), *words])


def test_another_host_is_possible_with_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(run: WatchedRun, server: WatchServer, pause_s: object) -> None:
        with server:
            # From other hosts, the page is asked for by any name.
            assert getter(server.url)("/metrics", Host="node17")[0] == 200

    monkeypatch.setattr(web, "serve", once)
    result = watch(root, "--web", "--host", "0.0.0.0")
    assert result.exit_code == 0, result.output
    assert "the page listens on 0.0.0.0: every host that reaches it can read the status of the run" in result.stderr
    assert watch(root, "--web", "--host", "127.0.0.2").stderr == ""


def test_a_port_that_is_taken(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = watch(root, "--web", "--port", port).exception
    assert isinstance(error, OptionsError)
    assert f"--host 127.0.0.1 --port {port}: cannot listen there" in str(error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--web", "--once"), "--once and --web exclude each other"),
        (("--port", "0", "--host", "0.0.0.0"), "--host and --port are those of a page: add --web"),
        (("--port", "9470"), "--host and --port are those of a page: add --web"),
    ],
)
def test_options_that_do_not_fit(root: Path, words: tuple[str, ...], message: str) -> None:
    assert str(watch(root, *words).exception) == message


@pytest.mark.long
def test_a_page_that_is_left_with_ctrl_c(root: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", WATCHES, "watch", "--run-root", str(root), "--web"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None and page.stderr is not None
            match = re.search(r"(http://127\.0\.0\.1:\d+/) ", page.stdout.readline())
            assert match is not None, page.stderr.read()
            assert Elements(getter(match[1])("/")[2]).text["state"] == "running"
            page.send_signal(signal.SIGINT)
            assert page.wait(60) == 0
            assert page.stderr.read() == ""
        finally:
            page.kill()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium in the system's packages")
@pytest.mark.slow
def test_a_real_browser(root: Path, tmp_path: Path) -> None:
    """Its script replaces the content: the browser's document has a step that was recorded after the page was sent."""
    run, ledger = WatchedRun(RunReader(root / RUN_ID)), Ledger(root / RUN_ID / LEDGER_NAME)
    with WatchServer(run, "127.0.0.1", 0) as server:
        answer = run.answer

        def later(path: str) -> tuple[str, str] | None:
            if path == "/content":
                ledger.record("committed", step=41, of=50)
                run.look()
            return answer(path)

        run.answer = later  # type: ignore[method-assign]
        dom = browse("--virtual-time-budget=3000", "--dump-dom", server.url)
        picture = tmp_path / "page.png"
        browse("--virtual-time-budget=1500", "--window-size=1180,900", f"--screenshot={picture}", server.url)
    page = Elements(dom)
    assert "41 of 50" in dom and page.text["state"] == "running"
    assert page.of("body", **{"class": ""}) or not page.of("body")[0].get("class")
    data = picture.read_bytes()
    assert data.startswith(PNG) and len(data) > 10_000


def browse(*words: str) -> str:
    """Run the browser, and return its output."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    done = subprocess.run([BROWSER, *options, *words], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
