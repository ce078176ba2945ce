"""`ckptless timeline` draws valid pictures and self-contained HTML pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.cli.timeline import write_timeline
from lightning_ckptless.cli.view.timeline import timeline_of
from lightning_ckptless.cli.view.timeline_page import timeline_page
from lightning_ckptless.errors import OptionsError
from tests.cli.ledgers import RUN_ID, STEPS, write_ledger
from tests.testing.test_compare import batch, write

VOID = {"meta", "br", "link", "img", "hr", "path", "use"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects URLs that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href"} and value and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_page_is_self_contained(tmp_path: Path) -> None:
    write_ledger(tmp_path)
    text = timeline_page(timeline_of("<b>run</b>", find_run(None, tmp_path).events, STEPS))
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    # An empty icon, so that the browser does not ask for one.
    assert parsed.fetched == ["data:,"]
    assert {"svg", "table", "style"} <= parsed.seen and "b" not in parsed.seen
    assert "script" not in parsed.seen and "@import" not in text and "url(http" not in text
    assert "1died by SIGKILLin placestep 2" in parsed.text
    assert "75.0%" in parsed.text
    assert all(name in parsed.text for name in ("what it was spent on", "training", "detect"))
    assert text.count('title="replay: ') == text.count("<td>died by SIGKILL</td>") > 0


@pytest.mark.parametrize("traced", [True, False])
def test_the_png_shows_curve_faults_and_phases(traced: bool, tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs")
    rows = [dict(batch(step.step, step.generation), at=step.at) for step in STEPS]
    trace = write(tmp_path / "trace", rows) if traced else None
    write_timeline(find_run(RUN_ID, tmp_path / "runs"), trace, [tmp_path / "out.png"])
    picture = imread(tmp_path / "out.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 1000
    # The curve, the faults and the phases each have their own colour.
    colours = set(np.unique((picture[..., :3] * 255).round().astype(int) @ [0x10000, 0x100, 1]).tolist())
    assert {0xCC3311, 0xDDAA33, 0x33BBEE, 0x0077BB, 0x004488} <= colours


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = find_run(str(write_ledger(tmp_path)), None)
    for name in ("a", "b"):
        write_timeline(run, None, [tmp_path / f"{name}{suffix}" for suffix in (".png", ".svg", ".html")])
    for suffix in (".png", ".svg", ".html"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_run_without_faults_has_no_recovery_table(tmp_path: Path) -> None:
    run = find_run(str(write_ledger(tmp_path)), None)
    events = [event for event in run.events if event.event in {"run_started", "run_ended"}]
    assert "<table" not in timeline_page(timeline_of("quiet", events, STEPS[:3]))


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs")
    out = tmp_path / "deep" / "run.html"
    result = CliRunner().invoke(app, ["timeline", "--run-root", str(tmp_path / "runs"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output == f"{out}\n"
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    run = find_run(str(write_ledger(tmp_path)), None)
    with pytest.raises(OptionsError, match=r"run.pdf: expected a .png, .svg or .html file"):
        write_timeline(run, None, [Path("run.pdf")])
    with pytest.raises(OptionsError, match="no trace found"):
        write_timeline(run, tmp_path, [tmp_path / "run.png"])
