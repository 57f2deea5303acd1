"""Every field of GKDConfig, and what becomes of it, as Markdown.

python tools/field_table.py > gkd_ds/FIELDS.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gkd_ds.config.fields import GROUPS, INACTIVE  # noqa: E402
from gkd_ds.config.inactive_fields import ALREADY, ANY, FIXED, RETIRED, Inactive  # noqa: E402

WORKS = "works"
APIS = ROOT / "tests/unit/config"

INTRODUCTION = """\
# Every field of GKDConfig

Made by `python tools/field_table.py > gkd_ds/FIELDS.md`; a test compares it with the code.

| answer | what it means |
|---|---|
| works | it has the meaning and the default that TRL gives it |
| already so | what it asks for is done anyway: those values are accepted; others are refused |
| fixed | there is one way here, for the reason given; other values are refused |
| retired | an old name; any value but the default is refused with its successor |

A refusal is an `InputError` when the configuration is made (exit code 2 of the command), with the reason that stands here. Of
the {seed} fields of the configuration that this project began with, {counts}. Fields that only TRL {trl} has are marked
TRL, our own *ours*; names that TRL's scripts keep in ScriptArguments or ModelConfig are marked *script*: they are arguments of
GKDConfig and flags of `python -m gkd_ds.train`, and no flags of HfArgumentParser, so that those classes can stand beside it."""


def table() -> str:
    """The whole page."""
    seed = {
        field["name"] for field in json.loads((APIS / "seed_api.json").read_text())["GKDConfig"]
    }
    trl = json.loads((APIS / "trl_api.json").read_text())
    counts = {answer: 0 for answer in (WORKS, ALREADY, FIXED, RETIRED)}
    for name in seed:
        counts[answer_of(name)] += 1
    told = ", ".join(
        f"{count} {'work' if answer == WORKS else f'are {answer}'}"
        for answer, count in counts.items()
    )
    release = trl.pop("source").split()[1]
    lines = [INTRODUCTION.format(seed=len(seed), counts=told, trl=release)]

    def origin(name: str) -> str:
        if name in seed:
            return ""
        places = {"GKDConfig": "TRL", "ScriptArguments": "*script*", "ModelConfig": "*script*"}
        return next((mark for place, mark in places.items() if name in trl[place]), "*ours*")

    for heading, options in GROUPS.items():
        lines += [
            "",
            f"## {heading}",
            "",
            "| works | default | | what it does |",
            "|---|---|---|---|",
        ]
        lines += [
            row(f"`{option.name}`", shown(option.default), origin(option.name), option.help)
            for option in options
        ]
    for answer in (ALREADY, FIXED, RETIRED):
        lines += ["", f"## {answer.capitalize()}", ""]
        lines += [f"| {answer} | default | accepted, too | | why |", "|---|---|---|---|---|"]
        lines += [
            row(f"`{one.name}`", shown(one.default), accepted(one), origin(one.name), one.reason)
            for one in INACTIVE.values()
            if one.kind == answer
        ]
    return "\n".join(lines) + "\n"


def answer_of(name: str) -> str:
    return INACTIVE[name].kind if name in INACTIVE else WORKS


def accepted(one: Inactive) -> str:
    if one.accepts is ANY:
        return "any value"
    if isinstance(one.accepts, dict):
        parts = [f"`{key}`: {', '.join(map(shown, values))}" for key, values in one.accepts.items()]
        return "; ".join(parts)
    return ", ".join(shown(value) for value in one.accepts)


def shown(value: Any) -> str:
    value = {dict: {}, list: []}.get(value, value) if isinstance(value, type) else value
    return f"`{value!r}`"


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(table(), end="")
