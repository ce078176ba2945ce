"""Futile starts: a program that ends by itself again and again, with no step in between."""

from __future__ import annotations

from lightning_ckptless.membership.parent import End
from lightning_ckptless.membership.verdict import Verdict

_STARTS = 3


class Futility:
    """Counts them, since the last that was none."""

    def __init__(self) -> None:
        self._starts = 0

    def judge(self, rank: int, end: End | None, *, has_begun: bool) -> Verdict | None:
        """Take in the loss that ended a start.

        Args:
            rank: the lost one.
            end: its end, where that is known.
            has_begun: whether a step was begun since the workers were started.

        Returns:
            A final verdict where more starts would not help.
        """
        if has_begun or end is None or end.exit_code < 0:
            self._starts = 0
            return None
        self._starts += 1
        if self._starts < _STARTS:
            return None
        reason = f"{_STARTS} starts in a row ended with exit code {end.exit_code} before the program came to train"
        return Verdict(rank, final=True, reason=reason)
