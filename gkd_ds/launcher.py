"""What the deepspeed launcher that started this process was told, where it matters and it does not pass it on."""

from __future__ import annotations

import os
from pathlib import Path

from gkd_ds.errors import InputError


def check_hostfile() -> None:
    """Raise InputError if the launcher was given a hostfile that does not exist.

    It would only warn, and start on this machine alone: hours later somebody wonders about the other nodes. The
    launcher is one of our ancestors; its command line is in /proc (elsewhere than on Linux nothing is checked).
    """
    for words in _command_lines_of_ancestors():
        if not any(word.endswith(("/deepspeed", "deepspeed.launcher.runner")) for word in words):
            continue
        hostfile = _option(words, "--hostfile") or _option(words, "-H")
        if hostfile and not os.path.isfile(hostfile):
            raise InputError(f"--hostfile {hostfile} does not exist; correct its path, or leave it out.")


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
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"))
            # The parent's id is the second field after the command's name, which stands in parentheses.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # no /proc, or the process has ended
            break
    return found
