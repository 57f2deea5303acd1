"""Reads what W&B wrote offline."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def records(path: str | Path) -> Iterator:
    """The records of W&B's transaction log: LevelDB's log format (blocks of 32 KiB) after a header
    of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, parts = Path(path).read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
