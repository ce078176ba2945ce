"""Messages are printed on their own lines, whatever a progress bar has left on the terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from lightning_ckptless.console import Bar, Console, WarningsOnConsole, framed


def shown(text: str) -> list[str]:
    """Return the lines that a terminal would show; supports only the control sequences used here."""
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


def test_the_line_of_a_bar_is_replaced_on_a_terminal() -> None:
    assert shown("\rEpoch 3:  30%|###       |" + framed("message", Bar.LINE, terminal=True) + "\n") == ["message"]


@pytest.mark.parametrize(("bar", "terminal"), [(Bar.LINE, False), (Bar.LIVE, True)])
def test_a_line_that_cannot_be_cleared_is_ended(bar: Bar, terminal: bool) -> None:
    lines = shown("\rEpoch 3:  30%|###" + framed("message", bar, terminal=terminal) + "\n")
    assert lines == ["Epoch 3:  30%|###", "message"]


def test_a_live_display_of_two_lines_redraws_itself_below_the_message() -> None:
    text = framed("message", Bar.LIVE, terminal=True) + "\n"
    below = text[text.index("message") :].count("\n") - 1
    # A display of two lines starts its redraw one line above the cursor.
    assert below >= 1


def test_without_a_bar_the_message_is_unchanged() -> None:
    assert framed("message", Bar.NONE, terminal=True) == framed("message", Bar.LIVE, terminal=False) == "message"


def test_a_console_writes_to_the_current_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    console.say("first")
    console.bar = Bar.LINE
    console.say("second")
    assert stream.getvalue() == "ckptless: first\n\nckptless: second\n"


def test_a_warning_is_shown_once_and_only_if_the_script_configures_no_logging(
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
