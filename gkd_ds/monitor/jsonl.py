"""A run in files: metrics.jsonl and rollouts.jsonl, which survive crashes, full disks and resumes.

metrics = JsonLines(Path("metrics.jsonl"))
metrics.append({"step": 1, "loss": 0.5})
metrics.truncate(step=0)
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from gkd_ds.monitor.sinks import Record
from gkd_ds.runtime import files

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


class JsonlSink:
    """Writes every record of a run into two files of its directory."""

    def __init__(self, run_dir: Path):
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._rollouts = JsonLines(run_dir / ROLLOUTS_FILE)

    def log(self, record: Record, shown: Record, due: bool) -> None:
        """Write what was measured, due or not."""
        self._metrics.append(record)

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Write one line per rollout."""
        for rollout in rollouts:
            self._rollouts.append({"step": step, **rollout})

    def close(self, exit_code: int) -> None:
        """Close both files; what is logged later opens them again."""
        self._metrics.close()
        self._rollouts.close()

    def sync(self) -> None:
        """Force both files onto the disk."""
        self._metrics.sync()
        self._rollouts.sync()

    def truncate(self, step: int, evaluations: int | None) -> dict[str, int]:
        """Forget every record after update `step`, and all but the first `evaluations` of it.

        Returns {file name: how many unreadable lines were dropped}, for files that had any.
        """
        # Of the update itself, the metrics hold one record before those of its evaluations.
        of_step = None if evaluations is None else evaluations + (step > 0)
        dropped = {
            METRICS_FILE: self._metrics.truncate(step, of_step),
            ROLLOUTS_FILE: self._rollouts.truncate(step),
        }
        return {name: lines for name, lines in dropped.items() if lines}


class JsonLines:
    """An append-only file with one JSON object per line and no torn lines.

    Every record has an integer `step`. A last line torn by a crash is removed on opening. When the
    disk is full, records wait in memory and are written with the next one that fits. NaN and
    infinities become null, because strict readers refuse the words.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def append(self, record: Record) -> None:
        """Hand one record to the operating system; a closed file is opened again."""
        assert isinstance(record["step"], int), record["step"]
        if self._file.closed:
            self._open()
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
        self._waiting += text.encode(errors="backslashreplace") + b"\n"
        try:
            self._write_waiting()
        except OSError as problem:
            print(
                f"{self.path}: {problem.strerror}; rows wait in memory for room.", file=sys.stderr
            )

    def truncate(self, step: int, at_step: int | None = None) -> int:
        """Keep the records up to `step`, and drop all others at once; returns how many unreadable
        lines were dropped, too.

        Of the records of `step` itself, the first `at_step` are kept (None: all).
        """
        self.close()
        kept, unreadable, left = [], 0, math.inf if at_step is None else at_step
        for line in self.path.read_bytes().splitlines():
            record = _parsed(line)
            unreadable += record is None
            if record is not None and record["step"] == step:
                left -= 1
            if record is not None and record["step"] <= step and left >= 0:
                kept.append(line + b"\n")
        files.replace_content(self.path, b"".join(kept))
        self._open()
        return unreadable

    def sync(self) -> None:
        """Force every record onto the disk, as far as there is room."""
        if self._file.closed:
            return
        try:
            self._write_waiting()
            files.flush(self.path)
        except OSError as problem:
            print(
                f"{self.path}: {problem.strerror}; its last rows are not on the disk.",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Safe to call twice. Records that still find no room are lost, with a message."""
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
        # Unbuffered: a record is either handed to the operating system or it raises here.
        self._file = open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0)
        whole = self._file.read()
        while whole and not (
            whole.endswith(b"\n") and _parsed(whole[whole.rfind(b"\n", 0, -1) + 1 :])
        ):
            whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
        self._end = len(whole)
        self._file.truncate(self._end)
        self._file.seek(self._end)


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
