"""Files that a crash leaves whole, and what other processes see of a run: the stop file, folders
that one run owns.
"""

import fcntl
import functools
import itertools
import os
import stat
from pathlib import Path
from typing import TextIO

from gkd_ds.runtime.errors import InputError, show


def open_anew(path: Path) -> TextIO:
    """A new, empty file to write text to. What had the name is replaced: through a link it could be
    anything.
    """
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8")


def flush(path: Path) -> None:
    """Force what was written to a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durably(directory: Path) -> None:
    """Make a directory, with its parents, unless it is there."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        flush(directory.parent)


def write_durably(path: Path, text: str) -> None:
    """Write a new file, in the place of what had its name, and return when the disk has it."""
    with open_anew(path) as file:
        file.write(text)
    flush(path)


def replace_content(path: Path, content: bytes) -> None:
    """Give a file another content at once: whenever a process dies, the file holds the old one or
    the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)


def check_stop_file(path: str | Path) -> None:
    """Refuse what is more than the mark it should be: it is removed when a run starts, and when it
    was obeyed.

    Raises:
        InputError: something other than an empty file has that name.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(
            f"GKDConfig field 'stop_file' is {show(str(path))}, which cannot be looked at "
            f"({error.strerror}); choose another file."
        ) from None
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        raise InputError(
            f"GKDConfig field 'stop_file' is {show(str(path))}, which exists and is no empty file; "
            "a run would remove it, so choose another name."
        )


@functools.cache
def claim_folder(directory: str, rank: int) -> str:
    """Make and lock a folder of `directory` for this rank's swap files, which no other process
    takes until this one ends. The same arguments give the same folder.

    DeepSpeed gives the files of every run the same names: two runs at a time would read each
    other's weights. Folders are numbered and taken again, so that runs that were killed fill no
    drive.
    """
    for number in itertools.count():
        place = Path(directory, f"run-{number}")
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / f"rank{rank}.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
            return str(place)
        except BlockingIOError:
            os.close(lock)
    raise AssertionError("the numbers have no end")
