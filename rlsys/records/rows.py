"""The rows of a JSONL file that grows, decoded once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rlsys.files import decode_row
from rlsys.rotation import GrowingFile


class Rows:
    """Follows a file of JSON objects and keeps them; lines that hold something else are skipped."""

    def __init__(self, path: Path):
        self._file = GrowingFile(path)
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All rows so far; empty if the file does not exist."""
        with self._lock:
            restarted, lines = self._file.new_lines()
            if restarted:
                self._rows = []
            self._rows.extend(row for line in lines if (row := decode_row(line)) is not None)
            return list(self._rows)
