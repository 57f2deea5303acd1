"""Files that a crash or a power failure leaves whole."""

import os
from pathlib import Path

from gkd_ds.config.paths import open_anew


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
