"""One run per directory: two would delete and overwrite each other's files."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd_ds.runtime import files, ranks
from gkd_ds.runtime.errors import InputError

LOCK = ".lock"
PATIENCE = 10.0  # seconds that a run waits for one that is ending


@contextmanager
def only_run(run_dir: str | Path) -> Iterator[None]:
    """Let no other run train in `run_dir` meanwhile. A collective.

    The ranks of a launcher that has died may still be at their last save, so it waits a little.
    Raises InputError on all ranks when the other run goes on. The lock belongs to rank 0's process:
    it is gone with it, however it ends.
    """
    lock, problem = None, ""
    if ranks.rank() == 0:
        lock, problem = _lock(Path(run_dir))
    if problem := ranks.broadcast(problem):
        raise InputError(problem)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(run_dir: Path) -> tuple[int | None, str]:
    """(the descriptor of the locked file, "") or (None, why not)."""
    try:
        files.make_durably(run_dir)
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        return (
            None,
            f"{run_dir / LOCK} cannot be opened ({error.strerror}); remove it, or choose another "
            "output_dir.",
        )
    patient_until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock, ""
        except BlockingIOError:
            if time.monotonic() > patient_until:
                os.close(lock)
                return (
                    None,
                    f"another run is training in {run_dir}; stop it, or choose another output_dir.",
                )
            time.sleep(0.2)
        except OSError as error:  # a file system without locks
            print(
                f"gkd_ds: {run_dir} cannot be locked ({error.strerror}); see to it that no other "
                "run uses it",
                file=sys.stderr,
                flush=True,
            )
            return lock, ""
