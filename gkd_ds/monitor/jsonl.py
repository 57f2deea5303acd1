"""An append-only file of JSON lines that survives crashes, full disks and resumes.

rows = JsonLines(Path("metrics.jsonl")) rows.append({"step": 1, "loss": 0.5}) rows.truncate(step=0)
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class JsonLines:
    """An append-only file with one JSON object per line and no torn lines.

    Every row has an integer `step`. A last line torn by a crash is removed on opening. When the
    disk is full, rows wait in memory and are written with the next one that fits. NaN and
    infinities become null, because strict readers refuse the words.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def append(self, row: Row) -> None:
        """Write one row through to the operating system (no fsync); a closed file is opened
        again.
        """
        assert isinstance(row["step"], int), row["step"]
        if self._file.closed:
            self._open()
        text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
        self._waiting += text.encode(errors="backslashreplace") + b"\n"
        try:
            self._write_waiting()
        except OSError as problem:
            print(
                f"{self.path}: {problem.strerror}; rows wait in memory for room.", file=sys.stderr
            )

    def truncate(self, step: int, at_step: int | None = None) -> int:
        """Keep the rows up to `step`, atomically; returns how many unreadable lines were dropped as
        well.

        Of the rows of `step` itself, the first `at_step` are kept (None: all).
        """
        self.close()
        kept, unreadable, left = [], 0, math.inf if at_step is None else at_step
        for line in self.path.read_bytes().splitlines():
            row = _parsed(line)
            unreadable += row is None
            if row is not None and row["step"] == step:
                left -= 1
            if row is not None and row["step"] <= step and left >= 0:
                kept.append(line + b"\n")
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._open()
        return unreadable

    def sync(self) -> None:
        """Force every row onto the disk, as far as there is room."""
        if self._file.closed:
            return
        try:
            self._write_waiting()
            os.fsync(self._file.fileno())
        except OSError as problem:
            print(
                f"{self.path}: {problem.strerror}; its last rows are not on the disk.",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Safe to call twice. Rows that still find no room are lost, with a message."""
        if self._file.closed:
            return
        try:
            self._write_waiting()
        except OSError as problem:
            print(f"{self.path}: {problem.strerror}; its last rows are lost.", file=sys.stderr)
        self._file.close()

    def _write_waiting(self) -> None:
        """All or nothing: an almost full disk takes a part first and raises at the next attempt."""
        rest = self._waiting
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(self._waiting)
        self._waiting = b""

    def _open(self) -> None:
        self._waiting = b""
        # Unbuffered: a row is either handed to the operating system or it raises here.
        self._file = open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0)
        whole = self._file.read()
        while whole and not (
            whole.endswith(b"\n") and _parsed(whole[whole.rfind(b"\n", 0, -1) + 1 :])
        ):
            whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
        self._end = len(whole)
        self._file.truncate(self._end)
        self._file.seek(self._end)


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
