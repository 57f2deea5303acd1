"""What the deepspeed launcher that started this process was told, where it matters and it does not
pass it on.

It is two processes: `deepspeed` itself, and on every host a `deepspeed.launcher.launch` that starts
the ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

from gkd_ds.runtime.errors import InputError


def check_hostfile() -> None:
    """Raise InputError if the launcher was given a hostfile that does not exist.

    It would only warn, and start on this machine alone: hours later somebody wonders about the
    other nodes. The launcher is one of our ancestors; its command line is in /proc (elsewhere than
    on Linux nothing is checked).
    """
    for words in _command_lines_of_ancestors():
        if not _is_deepspeed(words):
            continue
        hostfile = _option(words, "--hostfile") or _option(words, "-H")
        if hostfile and not os.path.isfile(hostfile):
            raise InputError(
                f"--hostfile {hostfile} does not exist; correct its path, or leave it out."
            )


class Launcher:
    """Notices that the launcher was ended. Make it early: what is not there by then is not missed.

    On one host `deepspeed` dies of a SIGTERM without a word to the process that it has started, and
    the ranks would train on, with nobody left to stop them.
    """

    def __init__(self) -> None:
        self._parent, self._grandparent = os.getppid(), 0
        if "deepspeed.launcher.launch" not in _command_line(self._parent):
            self._parent = 0
        else:
            grandparent = _parent_of(self._parent)
            self._grandparent = grandparent if _is_deepspeed(_command_line(grandparent)) else 0

    def is_gone(self) -> bool:
        """Whether one of the two has ended since. False without a launcher."""
        if not self._parent:
            return False
        if os.getppid() != self._parent:
            return True
        return bool(self._grandparent) and _parent_of(self._parent) != self._grandparent


def _is_deepspeed(words: list[str]) -> bool:
    return any(word.endswith(("/deepspeed", "deepspeed.launcher.runner")) for word in words)


def _option(words: list[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""]):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None


def _command_lines_of_ancestors() -> list[list[str]]:
    found, pid = [], os.getppid()
    while pid > 1:
        found.append(_command_line(pid))
        pid = _parent_of(pid)
    return found


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc, or the process has ended
        return []


def _parent_of(pid: int) -> int:
    """0 when there is none to be found."""
    try:
        # The parent's id is the second field after the command's name, which stands in parentheses.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
