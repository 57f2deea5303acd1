"""What a data set holds and what has no effect, or not the usual one: noted row by row, said once
for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from gkd_ds.runtime.errors import name_list


class Unread(StrEnum):
    """The kinds of notes, each with its sentence."""

    COLUMN = "these columns have no effect: {}"
    FIELD = "the chat template does not read: {}"
    PART = "of some answers the chat template prints only a part{}"
    STOP = "answers go on behind stop tokens that are words of theirs: {}"
    ALONE = (
        "the chat template's prompt opens a thought, and answers that do not continue it are poor "
        "references{}"
    )
    HEADER = "the chat template has no generation prompt, so {} is part of what the student learns"

    def note(self, name: str = "") -> str:
        """A note about a name, as plain text: worker processes send theirs home."""
        return f"{self.name} {name}"


def sentence(notes: Iterable[str]) -> str:
    """What the notes say together; empty if there is none."""
    named: dict[Unread, list[str]] = {}
    for note in sorted(notes):
        kind, _, name = note.partition(" ")
        named.setdefault(Unread[kind], []).append(name)
    return "; ".join(
        kind.format(name_list(named[kind]) if any(named[kind]) else "")
        for kind in Unread
        if kind in named
    )
