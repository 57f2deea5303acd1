"""What becomes of every architecture: equal to the dense reference, refused, or wrong.

PYTHONPATH=. python -m tests.dist.architecture_outcomes DIRECTORY [NAME ...]      # prints the outcomes
PYTHONPATH=. python -m tests.dist.architecture_outcomes DIRECTORY --write         # and ARCHITECTURES.md
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.architectures import NAMES
from tests.dist.rank_server import Job, Server

LOSS, GRADIENT = 1e-5, 1e-4  # relative
RANKS = {"plain": 1, "zero3": 2}
PATIENCE = 60.0  # seconds for one architecture in one form; two free cores need two
EARLY = 10.0  # seconds within which a refusal comes


@dataclass(frozen=True)
class Outcome:
    """`kind` is equal, refused, different or crashed; `detail` says how."""

    kind: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind in ("equal", "refused")


def outcomes(server: Server, directory: Path, name: str) -> dict[str, Outcome]:
    """One architecture in both forms."""
    place = directory / name
    place.mkdir(parents=True, exist_ok=True)
    found = {}
    for form, world in RANKS.items():
        recipe = {"output_dir": str(place), "architecture": name, "form": form}
        job = server.start(world, recipe, module="tests.dist.architecture_run")
        found[form] = judge(place, form, job.wait(PATIENCE), job)
    return found


def judge(place: Path, form: str, codes: list[int | None], job: Job) -> Outcome:
    results = [json.loads(file.read_text()) for file in sorted(place.glob(f"{form}.*.json"))]
    if None in codes:
        return Outcome("crashed", f"no end within {PATIENCE:.0f} s; {last_line(job)}")
    if set(codes) == {2}:
        slowest = max(result["seconds"] for result in results)
        if slowest > EARLY:
            return Outcome("crashed", f"refused only after {slowest:.0f} s")
        return Outcome("refused", results[0]["refused"])
    if set(codes) != {0}:
        return Outcome("crashed", last_line(job))
    return compare(json.loads((place / "reference.json").read_text()), results)


def compare(right: dict, results: list[dict]) -> Outcome:
    wrong = []
    for key, tolerance in (("loss", LOSS), ("grad_norm", GRADIENT)):
        values = [result[key] for result in results]
        if not all(math.isclose(value, right[key], rel_tol=tolerance) for value in values):
            error = max(abs(value / right[key] - 1) for value in values)
            wrong.append(f"{key} off by {error:.1e}")
    tokens = {int(row): ids for result in results for row, ids in result["tokens"].items()}
    rows = [row for row, ids in enumerate(right["tokens"]) if tokens.get(row) != ids]
    if rows:
        wrong.append(f"tokens of rows {rows} differ")
    return Outcome("different", ", ".join(wrong)) if wrong else Outcome("equal")


def last_line(job: Job) -> str:
    """What a crash says last, and from where: of the rank that has an error."""
    lines = job.said().splitlines()
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if not errors:
        return (lines or ["nothing was said"])[-1][:200]
    before = [re.search(r'File ".*?([^/]+)", line (\d+)', line) for line in lines[: errors[-1]]]
    place = [":".join(found.groups()) for found in before if found]
    return f"{lines[errors[-1]][:200]} ({place[-1] if place else '?'})"


def main(directory: str, *names: str) -> None:
    with Server() as server:
        for name in names or NAMES:
            for form, outcome in outcomes(server, Path(directory), name).items():
                print(f"{name} | {form} | {outcome.kind} | {outcome.detail}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
