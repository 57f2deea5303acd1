"""What DeepSpeed compiles when it is first used: one process at a time, and a killed one is no
obstacle.

    with builds.taking_turns():
        ...                         # whatever may need an op of DeepSpeed's
    builds.load(AsyncIOBuilder())   # one op by name

torch marks a folder in which it builds with a file `lock`, and whoever finds the file waits,
without a word, until it is gone: after a kill, for ever. Here a build holds a lock of the kernel's
besides, which ends with its process, on whatever host of a shared folder that ran. So a `lock` that
is found while nobody holds the other one was left behind, unless a program without gkd_ds builds
there: that is looked for on this host, and cannot be seen on another one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

logger = logging.getLogger(__name__)

OURS = "gkd_ds.lock"
LONGEST = 1800.0  # seconds that a build takes at most; counts where the file system has no locks
SAID_AFTER = 5.0  # seconds of waiting


@contextmanager
def taking_turns() -> Iterator[None]:
    """Inside, builds of torch's and DeepSpeed's wait for each other as the module says."""
    theirs = cpp_extension.FileBaton
    cpp_extension.FileBaton = Turn
    try:
        yield
    finally:
        cpp_extension.FileBaton = theirs


def load(builder: Any) -> Any:
    """The op of one of DeepSpeed's builders, built if need be."""
    with taking_turns():
        return builder.load(verbose=False)


class Turn(FileBaton):
    """torch's mark of a build, and the kernel's lock beside it."""

    def try_acquire(self) -> bool:
        """Wait for the turn, then True: torch builds what is not up to date, perhaps nothing."""
        self._mark, self._has_locks = Path(self.lock_file_path), True
        self._lock = os.open(self._mark.with_name(OURS), os.O_RDWR | os.O_CREAT, 0o666)
        _wait(self._lock_it, self._mark, pause=0.1)
        _wait(self._mark_it, self._mark, pause=1.0)
        return True

    def release(self) -> None:
        super().release()
        os.close(self._lock)

    def _lock_it(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            self._has_locks = False
        return True

    def _mark_it(self) -> bool:
        if super().try_acquire():
            return True
        if not _is_used(self._mark) and (self._has_locks or _age(self._mark) > LONGEST):
            self._mark.unlink(missing_ok=True)
        return False


def _wait(condition: Callable[[], bool], mark: Path, pause: float) -> None:
    """Until `condition()` holds, looking every `pause` seconds."""
    started, said = time.monotonic(), False
    while not condition():
        if not said and time.monotonic() - started > SAID_AFTER:
            said = True
            logger.warning(
                "Waiting for another process that builds in %s; if there is none, remove %s.",
                mark.parent,
                mark,
            )
        time.sleep(pause)


def _is_used(mark: Path) -> bool:
    """Whether a process of this host builds there: torch's keeps the mark open until the end, and
    ninja, which runs in the folder, outlives a torch that is killed.
    """
    mark = mark.resolve()
    for process in psutil.process_iter(["name", "cwd", "open_files"]):
        name, folder, files = (process.info[key] for key in ("name", "cwd", "open_files"))
        if name == "ninja" and folder == str(mark.parent):
            return True
        if any(file.path == str(mark) for file in files or ()):
            return True
    return False


def _age(mark: Path) -> float:
    """Seconds; none where it is gone."""
    try:
        return time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return 0.0
