"""What becomes of every architecture: equal to the dense reference, refused at the start, or wrong.

PYTHONPATH=. python -m tests.dist.architecture_outcomes            # writes gkd_ds/ARCHITECTURES.md
PYTHONPATH=. python -m tests.dist.architecture_outcomes --all      # all of transformers' models
PYTHONPATH=. python -m tests.dist.architecture_outcomes bloom rwkv # says what becomes of these
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from tests import ROOT
from tests.architectures import LEFT_OUT, NAMES, SUITE
from tests.dist.rank_server import Job, Server

LIST = ROOT / "gkd_ds" / "ARCHITECTURES.md"
LOSS, GRADIENT = 1e-5, 1e-4  # relative
RANKS = {"plain": 1, "zero3": 2}
AT_ONCE = 3  # architectures: ranks spend a good part of their time waiting for each other
PATIENCE = 120.0  # seconds for a form; two free cores need one or two
EARLY = 10.0  # seconds within which a refusal comes


@dataclass(frozen=True)
class Outcome:
    """`kind` is equal, refused, different or crashed; `detail` says how."""

    kind: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind in ("equal", "refused")


Outcomes = dict[str, dict[str, Outcome]]  # by architecture, then by form


def find_out(server: Server, directory: Path, names: Sequence[str] = SUITE) -> Outcomes:
    """Run every architecture in every form."""
    found: Outcomes = {}
    for batch in (names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)):
        found |= {name: {} for name in batch}
        for form, world in RANKS.items():
            jobs = {name: _start(server, directory / name, form, world) for name in batch}
            for name, job in jobs.items():
                found[name][form] = _judge(directory / name, form, job)
    return found


def _start(server: Server, place: Path, form: str, world: int) -> Job:
    place.mkdir(parents=True, exist_ok=True)
    recipe = {"output_dir": str(place), "architecture": place.name, "form": form}
    return server.start(world, recipe, module="tests.dist.architecture_run")


def _judge(place: Path, form: str, job: Job) -> Outcome:
    codes = set(job.wait(PATIENCE))
    results = [json.loads(file.read_text()) for file in sorted(place.glob(f"{form}.*.json"))]
    if codes == {0}:
        return _compare(json.loads((place / "reference.json").read_text()), results)
    if codes != {2}:
        return Outcome("crashed", _last_error(job))
    if (slowest := max(result["seconds"] for result in results)) > EARLY:
        return Outcome("crashed", f"refused only after {slowest:.0f} s")
    return Outcome("refused", results[0]["refused"].replace(f"{place.parent}/", ""))


def _compare(right: dict, results: list[dict]) -> Outcome:
    wrong = []
    for key, tolerance in (("loss", LOSS), ("grad_norm", GRADIENT)):
        values = [result[key] for result in results]
        if not all(math.isclose(value, right[key], rel_tol=tolerance) for value in values):
            error = max(abs(value / right[key] - 1) for value in values)
            wrong.append(f"{key} off by {error:.1e}")
    tokens = {int(row): ids for result in results for row, ids in result["tokens"].items()}
    rows = [row for row, ids in enumerate(right["tokens"]) if tokens.get(row) != ids]
    if rows:
        wrong.append(f"the tokens of rows {rows} differ")
    return Outcome("different", ", ".join(wrong)) if wrong else Outcome("equal")


def _last_error(job: Job) -> str:
    """The last error that any rank tells, and from where."""
    lines = job.said().splitlines()
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if not errors:
        return f"ended without an error: {lines[-1:]}"
    calls = re.findall(r'File ".*?([^/]+)", line (\d+)', "\n".join(lines[: errors[-1]]))
    return f"{lines[errors[-1]][:200]} ({':'.join(calls[-1]) if calls else '?'})"


# ---------------------------------------------------------------------------------------- the list


def listed() -> dict[str, tuple[str, str]]:
    """The kinds of outcome, plain and ZeRO-3, that ARCHITECTURES.md has for each architecture."""
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| (\w+) \|", LIST.read_text(), re.MULTILINE)
    return {name: (plain, zero3) for name, plain, zero3 in rows}


def as_text(found: Outcomes) -> str:
    """ARCHITECTURES.md."""
    lines = [HEAD.format(version=transformers.__version__, count=len(found))]
    for name, forms in found.items():
        kinds = " | ".join(outcome.kind for outcome in forms.values())
        reasons = dict.fromkeys(outcome.detail for outcome in forms.values() if outcome.detail)
        lines.append(f"| `{name}` | {kinds} | {' / '.join(reasons)} |")
    lines += ["", "Cannot be tried:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in sorted(LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


HEAD = """\
# What becomes of an architecture

Generated by `python -m tests.dist.architecture_outcomes`; `tests/dist/test_architectures.py` fails where it is out of date.

Each of these {count} architectures of transformers {version} was made tiny and random (`tests/architectures.py`), as a student and, with
one layer more, as a teacher. *equal*: loss ({loss:.0e}), gradient norm ({gradient:.0e}) and greedy tokens of a window of ragged rows are those of the
dense float64 model, row by row, without padding or cache. *refused*: exit code 2 and this sentence, within ten seconds.
Plain is one process at ZeRO stage 0, ZeRO-3 two ranks with both models partitioned.

| architecture | plain | ZeRO-3 | why |
|---|---|---|---|""".replace("{loss:.0e}", f"{LOSS:.0e}").replace(
    "{gradient:.0e}", f"{GRADIENT:.0e}"
)


def main(names: list[str]) -> None:
    with Server() as server, tempfile.TemporaryDirectory() as directory:
        chosen = NAMES if names == ["--all"] else names or SUITE
        found = find_out(server, Path(directory), chosen)
    for name, forms in found.items():
        print(name, *(f"{form}: {o.kind} {o.detail}" for form, o in forms.items()), sep=" | ")
    if not names:
        before = listed() if LIST.exists() else {}
        lost = [
            n
            for n, o in found.items()
            if "equal" in before.get(n, ()) and o["plain"].kind != "equal"
        ]
        assert not lost, f"right before, and not any more: {lost}"
        LIST.write_text(as_text(found))


if __name__ == "__main__":
    main(sys.argv[1:])
