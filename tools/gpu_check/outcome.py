"""What a check answers: passed or failed or skipped, numbers, and one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Skip(Exception):
    """A check cannot be made here; the message is the reason, to be read after "skipped:"."""


@dataclass(frozen=True)
class Outcome:
    """`numbers` go into the JSON, `sentence` into the table as well."""

    outcome: str
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def judge(holds: bool, sentence: str, **numbers: Any) -> Outcome:
    """Passed where it `holds`, else failed."""
    return Outcome(PASSED if holds else FAILED, sentence, numbers)
