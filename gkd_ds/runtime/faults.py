"""Faults on demand, so that tests and operators can see what a run does when it is killed at a
given point.

    GKD_FAULT=kill:save:3:1 deepspeed --module gkd_ds.train --config recipe.yaml

does to rank 1 what a power cut would do at the third write step of its saves. `GKD_FAULT` is a list
of `<action>:<point>:<n>[:<rank>]`, separated by commas: when a process passes the point for the
n-th time, it

    kill    sends itself SIGKILL
    term    sends itself SIGTERM (an orderly stop)
    sleep   sleeps for an hour, as a hung device or file system would
    raise   raises RuntimeError
    full    raises OSError "No space left on device"

Points have dotted names; `save` stands for each of `save.hash`, `save.rename`, and so on. Without a
rank every rank obeys. Without the variable a point costs one look at an empty list.
"""

import errno
import os
import signal
import sys
import time
from collections import Counter
from typing import NamedTuple

from gkd_ds.runtime.errors import InputError


class Fault(NamedTuple):
    """One entry of GKD_FAULT; `rank` None means every rank."""

    action: str
    name: str
    occurrence: int
    rank: int | None


ACTIONS = ("kill", "term", "sleep", "raise", "full")


def parse(text: str) -> list[Fault]:
    """The faults that `text` (the value of GKD_FAULT) asks for. Raises InputError."""
    faults = []
    for entry in filter(None, text.split(",")):
        action, _, rest = entry.partition(":")
        name, *numbers = rest.split(":")
        well_formed = (
            name and len(numbers) in (1, 2) and all(number.isdecimal() for number in numbers)
        )
        if action not in ACTIONS or not well_formed:
            raise InputError(
                f"GKD_FAULT entry {entry!r} is not <action>:<point>:<n>[:<rank>] with one of the "
                "actions "
                f"{', '.join(ACTIONS)}; correct it or unset GKD_FAULT."
            )
        faults.append(
            Fault(action, name, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else None)
        )
    return faults


_faults: list[Fault] | None = None  # None: GKD_FAULT was not looked at yet
_passed: Counter[str] = Counter()


def arm(text: str) -> None:
    """Plant these faults instead of the present ones, and count from zero. Raises InputError."""
    global _faults
    _faults = parse(text)
    _passed.clear()


def point(name: str) -> None:
    """Mark a place where a fault can be planted: `faults.point("rollout")`."""
    if _faults is None:
        arm(os.environ.get("GKD_FAULT", ""))
    if not _faults:
        return
    names = [name, *(name[:i] for i, letter in enumerate(name) if letter == ".")]
    _passed.update(names)
    for fault in _faults:
        here = fault.rank is None or fault.rank == int(os.environ.get("RANK", "0"))
        if here and fault.name in names and _passed[fault.name] == fault.occurrence:
            _act(fault.action, name)


def _act(action: str, name: str) -> None:
    print(f"GKD_FAULT: {action} at {name}", file=sys.stderr, flush=True)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "sleep":
        time.sleep(3600)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    else:
        raise RuntimeError(f"GKD_FAULT asked for this at {name}")
