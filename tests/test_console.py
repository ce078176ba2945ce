"""A message begins a line of its own, whatever a progress bar has left on the terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from lightning_ckptless.console import Bar, Console, WarningsOnConsole, framed


def shown(text: str) -> list[str]:
    """The lines that a terminal shows, for the few control sequences that matter here."""
    lines, row, column = [""], 0, 0
    text = text.replace("\x1b[K", "\0")
    for character in text:
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character == "\0":
            lines[row] = lines[row][:column]
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line for line in lines if line]


def test_a_line_of_a_bar_is_replaced_on_a_terminal() -> None:
    assert shown("\rEpoch 3:  30%|###       |" + framed("message", Bar.LINE, terminal=True) + "\n") == ["message"]


@pytest.mark.parametrize(("bar", "terminal"), [(Bar.LINE, False), (Bar.LIVE, True)])
def test_a_line_that_cannot_be_cleared_is_ended(bar: Bar, terminal: bool) -> None:
    lines = shown("\rEpoch 3:  30%|###" + framed("message", bar, terminal=terminal) + "\n")
    assert lines == ["Epoch 3:  30%|###", "message"]


def test_a_live_display_of_two_lines_redraws_itself_below_the_message() -> None:
    text = framed("message", Bar.LIVE, terminal=True) + "\n"
    below = text[text.index("message") :].count("\n") - 1
    # From the line under the last one, a display of two lines moves up by one.
    assert below >= 1


def test_without_a_bar_nothing_is_added() -> None:
    assert framed("message", Bar.NONE, terminal=True) == framed("message", Bar.LIVE, terminal=False) == "message"


def test_a_console_says_it_on_the_stderr_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    console.say("first")
    console.bar = Bar.LINE
    console.say("second")
    assert stream.getvalue() == "ckptless: first\n\nckptless: second\n"


def test_a_warning_is_shown_once_and_only_where_the_program_logs_nothing_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    shown = WarningsOnConsole(said.append)
    of_package = logging.getLogger("lightning_ckptless.trainer.data.loader")
    for handlers in ([], [logging.NullHandler()]):
        monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
        shown.attach()
        of_package.warning("ckptless: %d of two", 1 + len(handlers))
        shown.detach()
    assert said == ["1 of two"]
