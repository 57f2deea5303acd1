"""What a resume does about a field whose value is not the one that the checkpoint was written with.

A checkpoint holds weights, the optimizer's moments, counters, and the position in the data. The
rest is the configuration's: a field that has changed acts from the next window on, and is named.
The schedule of the learning rate is evaluated anew, at the number of updates so far and for the
number of updates now asked for. Whatever a checkpoint cannot go on with is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gkd_ds.config.changes import CHANGES, Change
from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.redaction import redact

PASSED = {Change.OPTIMIZER: "optimizer", Change.SCHEDULE: "schedule"}


def settings(config: GKDConfig) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: with what its DeepSpeed files hold, not only
    their names.
    """
    files = zip(("deepspeed", "teacher_deepspeed"), config.read_deepspeed_files(), strict=True)
    return json.loads(json.dumps(redact({**config.to_dict(), **dict(files)})))


def changes(
    before: dict[str, Any], now: dict[str, Any], passed: tuple[str, ...] = ()
) -> Iterator[str]:
    """One sentence for each change that is to be named. Both are `settings`; `passed` says which of
    "optimizer" and "schedule" the caller passes.
    """
    for name, change in CHANGES.items():
        if name in before and change is not Change.QUIET:
            for place, was, value in _differences(name, before[name], now.get(name)):
                yield difference(place, was, value) + _effect(change, now, passed)


def difference(name: str, was: Any, now: Any) -> str:
    return f"differs from the checkpoint: {name} was {_short(was)} and is now {_short(now)}"


def _effect(change: Change, now: dict[str, Any], passed: tuple[str, ...]) -> str:
    """What a change does not do."""
    if change is Change.LOADS:
        return "; the weights are the checkpoint's"
    if change is Change.MEASURES and now["metric_for_best_model"] is not None:
        return "; evaluations before and after it are compared as if they were of one kind"
    if change is Change.PAST:
        return ", which changes nothing: it acts before the first update"
    if PASSED.get(change) in passed:
        return f", which changes nothing: the {PASSED[change]} is one that was passed"
    return ""


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values that differ, those inside of objects by their place: deepspeed.zero_optimization.
    stage.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            yield from _differences(f"{name}.{key}", was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def _short(value: Any, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."
