"""Paths that a user gives: what must exist, and what can be written. No torch, so that a wrong one
answers at once.
"""

import fcntl
import functools
import itertools
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TextIO

from gkd_ds.config.values import is_text, show, wrong

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def check_model(name: str, model: str | None, init_kwargs: dict | None) -> None:
    """A local directory with a config.json (or the init kwargs' gguf_file), or a plausible hub
    name.
    """
    if model is None:
        return
    if not os.path.isdir(model):
        check_path_or_hub_name(name, model, "a model's directory", existing_is_fine=False)
        return
    needed = (init_kwargs or {}).get("gguf_file") or "config.json"
    if is_text(needed) and not os.path.isfile(os.path.join(model, needed)):
        raise wrong(
            name,
            f"names the directory {show(model)}, which has no {needed}; give the directory of a "
            "saved model",
        )


def check_dataset(name: str, dataset: str | None) -> None:
    if dataset is None or os.path.isfile(dataset):
        return
    if os.path.isdir(dataset):
        if not os.listdir(dataset):
            raise wrong(name, f"names the directory {show(dataset)}, which is empty")
        return
    if re.search(r"\.(jsonl?|parquet)(\.\w+)?$", dataset):
        raise wrong(name, f"names the file {show(dataset)}, which does not exist; check the path")
    check_path_or_hub_name(name, dataset, "a file or directory")


def check_path_or_hub_name(name: str, value: str, what: str, existing_is_fine: bool = True) -> None:
    if existing_is_fine and os.path.exists(value):
        return
    if not HUB_NAME.fullmatch(value) or os.path.exists(value):
        raise wrong(
            name,
            f"is {show(value)}, which is neither {what} that exists nor a hub name such as "
            "org/name; check the path",
        )


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
        what = f"is {show(str(path))}, which cannot be looked at ({error.strerror}); choose another file"
        raise wrong("stop_file", what) from None
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        raise wrong(
            "stop_file",
            f"is {show(str(path))}, which exists and is no empty file; a run would remove it, so "
            "choose another name",
        )


def open_anew(path: Path) -> TextIO:
    """A new, empty file to write text to. What had the name is replaced: through a link it could be
    anything.
    """
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8")


def obstacle_to_writing(directory: str) -> str | None:
    """Why nothing can be written to `directory`, which need not exist yet; None when something can.

    Tried, not asked: the permissions of a read-only or full file system say that one may.
    """
    path = Path(directory).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror


@functools.cache
def place_of_our_own(directory: str, rank: int) -> str:
    """A folder of `directory` for this rank's swap files, which no other process takes until this
    one ends.

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
