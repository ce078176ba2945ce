"""Follow a file of JSON lines that other processes are still writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """Read the JSON lines that were added to a file since the last read.

    Args:
        path: path of the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the new complete lines; a torn one is left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        rows = []
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows
