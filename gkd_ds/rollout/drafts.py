"""What every row was completed with last, for rollout_speculation: tokens on rank 0's disk.

Ranks see other rows in every epoch, so a window's drafts are handed out and its completions
collected, a few megabytes each. Only rank 0 has a file, of slots of one size: what is longer is
cut, and is a shorter draft. The file has no name, so that no run leaves one behind; a checkpoint
holds what is in it.

A draft changes no token (speculation.py): one that a broken or full disk loses costs time, and no
run.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

logger = logging.getLogger(__name__)

FILE = "drafts.int32"  # in a checkpoint: the length of every row's draft, then all tokens
TOKEN = np.dtype("<i4")
ROWS_BETWEEN_HEARTBEATS = 4096


def slot_tokens(disk_mb: int, rows: int) -> int:
    """How many tokens of each row there is room for. Raises InputError for none."""
    tokens = disk_mb * 2**20 // (TOKEN.itemsize * rows)
    if not tokens:
        raise InputError(
            f"GKDConfig field 'speculation_disk_mb' is {disk_mb}, which has no room for one token "
            f"of each of {rows:,} rows; raise it, or set rollout_speculation to none."
        )
    return tokens


class Drafts:
    """The drafts of a data set of `rows` rows, in `directory`. Methods are collectives."""

    def __init__(self, directory: Path, rows: int, disk_mb: int):
        """Raises InputError where there is no room, OSError where the disk refuses."""
        self.rows, self.slot = rows, slot_tokens(disk_mb, rows)
        self._lengths = np.zeros(rows, TOKEN)
        if ranks.rank() == 0:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)

    def given_to(self, samples: list[Sample]) -> list[Sample]:
        """The samples, with their drafts where they have one."""
        wanted = ranks.gather([sample.sample_id for sample in samples if self._has_slot(sample)])
        is_mine = ranks.rank() == 0
        found = ranks.broadcast(
            {row: self._found(row) for rows in wanted for row in rows} if is_mine else None
        )
        return [
            replace(sample, draft_ids=found[sample.sample_id].tolist())
            if self._has_slot(sample)
            else sample
            for sample in samples
        ]

    def keep(self, rollouts: list[Rollout]) -> None:
        """Remember how a window was completed."""
        mine = [
            (rollout.sample_id, np.array(rollout.completion_ids[: self.slot], TOKEN))
            for rollout in rollouts
            if self._has_slot(rollout)
        ]
        everybody_s = ranks.gather(mine)
        if ranks.rank() == 0:
            for row, tokens in (pair for some in everybody_s for pair in some):
                self._write(row, tokens)

    def _has_slot(self, sample: Sample | Rollout) -> bool:
        """Whether the student completes it with the draws of the first epoch."""
        return sample.source is Source.STUDENT and sample.sample_id < self.rows

    # -- rank 0's file -----------------------------------------------------------------------------

    def _found(self, row: int) -> np.ndarray:
        try:
            return self._read(row)
        except OSError as error:
            self._lose(row, error)
            return self._read(row)  # nothing

    def _read(self, row: int) -> np.ndarray:
        length = int(self._lengths[row])
        raw = os.pread(self._file.fileno(), length * TOKEN.itemsize, self._place(row))
        return np.frombuffer(raw, TOKEN)

    def _write(self, row: int, tokens: np.ndarray) -> None:
        try:
            written = os.pwrite(self._file.fileno(), tokens.tobytes(), self._place(row))
            self._lengths[row] = written // TOKEN.itemsize
        except OSError as error:
            self._lose(row, error)

    def _lose(self, row: int, error: OSError) -> None:
        logger.warning("The draft of row %d is lost: %s.", row, error.strerror)
        self._lengths[row] = 0

    def _place(self, row: int) -> int:
        return row * self.slot * TOKEN.itemsize

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, directory: Path, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Put all drafts into a checkpoint. Raises OSError."""
        if ranks.rank() != 0:
            return
        with open(directory / FILE, "wb") as file:
            file.write(self._lengths.tobytes())
            for row in range(self.rows):
                file.write(self._read(row).tobytes())
                if row % ROWS_BETWEEN_HEARTBEATS == 0:
                    heartbeat()

    def load(self, directory: Path, vocabulary: int) -> None:
        """Take over what a checkpoint holds; nothing where it was written without drafts. Raises
        InputError for anything but drafts of this data set, and OSError, on all ranks.
        """

        def work() -> None:
            if ranks.rank() == 0 and (directory / FILE).exists():
                self._load(directory / FILE, vocabulary)

        ranks.run_on_all_ranks(work)

    def _load(self, path: Path, vocabulary: int) -> None:
        with open(path, "rb") as file:
            lengths = np.fromfile(file, TOKEN, self.rows)
            size = TOKEN.itemsize * (self.rows + lengths.sum(dtype=np.int64))
            is_right = len(lengths) == self.rows and (lengths >= 0).all()
            if not is_right or size != path.stat().st_size:
                raise InputError(f"{path} does not hold drafts of {self.rows:,} rows.")
            for row, length in enumerate(lengths.tolist()):
                tokens = np.fromfile(file, TOKEN, length)
                if ((tokens < 0) | (tokens >= vocabulary)).any():
                    raise InputError(f"{path} has tokens that are not in the vocabulary.")
                self._write(row, tokens[: self.slot])
