"""What the deepspeed launcher that started this process was told, where it matters and it does not
pass it on; and whether the launcher is still there.

It is two processes: `deepspeed` itself, and on every host a `deepspeed.launcher.launch` that starts
the ranks. Both are looked for among our ancestors, in /proc: elsewhere than on Linux nothing is
found, and nothing is missed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from gkd_ds.runtime.errors import InputError

LAUNCH = "deepspeed.launcher.launch"


class LauncherGone(Exception):
    """The launcher ended before its ranks had begun: there is nothing to save, and nobody waits."""


def check_hostfile() -> None:
    """Raise InputError if the launcher was given a hostfile that does not exist.

    It would only warn, and start on this machine alone: hours later somebody wonders about the
    other nodes.
    """
    for words in map(_command_line, _ancestors()):
        if not _is_deepspeed(words):
            continue
        hostfile = _option(words, "--hostfile") or _option(words, "-H")
        if hostfile and not os.path.isfile(hostfile):
            raise InputError(
                f"--hostfile {hostfile} does not exist; correct its path, or leave it out."
            )


def is_gone() -> bool:
    """Whether DeepSpeed's launcher has started this process and has ended since. False without a
    launcher.

    On one host `deepspeed` dies of a SIGTERM without a word to the process that it has started, and
    the ranks would train on, with nobody left to stop them. What is there is asked, not what has
    changed: so a launcher counts that ended before anybody looked, while this process imported.
    """
    # launch.py sets the variable, for its ranks alone: torchrun, Slurm, and whoever starts one
    # process in the background and leaves, do not. Where even the first process has it, launch.py
    # has started a container around the rank, and cannot be seen from inside.
    if "CROSS_SIZE" not in os.environ or not os.path.exists("/proc/self/stat"):
        return False
    if b"CROSS_SIZE" in _variables(1):
        return False
    for pid in _ancestors():
        words = _command_line(pid)
        if LAUNCH in words:
            return _was_started_by_deepspeed(words) and _is_adopted(pid)
    return True


def _was_started_by_deepspeed(words: list[str]) -> bool:
    """Whether `deepspeed` wrote this command line of launch.py's, for its own host: then it always
    gives a log level. Over pdsh, where a shell is between the two, it does not.
    """
    options = itertools.takewhile(_belongs_to_an_option, words[words.index(LAUNCH) + 1 :])
    return any(word.startswith("--log_level=") for word in options)


def _belongs_to_an_option(word: str) -> bool:
    return word.startswith("-") or word.isdigit()


def _is_adopted(pid: int) -> bool:
    """Whether the parent of launch.py is not the `deepspeed` that has started it, but whoever takes
    in orphans: the first process, or a session's or a container's manager.

    A program that calls `deepspeed`'s main function is told from those by its interpreter.
    """
    parent = _parent_of(pid)
    if _is_deepspeed(_command_line(parent)):
        return False
    return parent == 1 or _program(parent) != _program(pid)


def _is_deepspeed(words: list[str]) -> bool:
    names = ("/deepspeed", "/ds", "deepspeed.launcher.runner")
    return any(word.endswith(names) for word in words)


def _option(words: list[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""]):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None


def _ancestors() -> Iterator[int]:
    """From the parent up."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        pid = _parent_of(pid)


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc, or the process has ended
        return []


def _variables(pid: int) -> list[bytes]:
    """The names of its environment variables."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # as above, or it is somebody else's
        return []
    return [variable.partition(b"=")[0] for variable in variables]


def _program(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:  # as above, or it is somebody else's
        return None


def _parent_of(pid: int) -> int:
    """0 when there is none to be found."""
    try:
        # The parent's id is the second field after the command's name, which stands in parentheses.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
