"""The quickstart with tiny models, for tests on hosts: its files, its recipe, and what it left
behind.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gkd_ds.checkpoint import manifest
from gkd_ds.config.recipe import read_recipe
from tests import ROOT, tiny

QUICKSTART = ROOT / "launch" / "recipes" / "quickstart.yaml"
UPDATES = 30
# What must differ from the quickstart's recipe so that it is tiny, and so that it saves, logs and
# fails often.
FIELDS = {
    "max_steps": UPDATES,
    "max_new_tokens": 8,
    "max_length": 128,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
}


def write_recipe(directory: Path, **fields) -> Path:
    """Models and data, and the quickstart's recipe with these, with FIELDS and with `fields`. The
    recipe's path.
    """
    if not (directory / "student").exists():
        tiny.make_everything(directory, rows=32)
        (directory / "data").mkdir()
        for split in ("train.jsonl", "test.jsonl"):
            (directory / split).rename(directory / "data" / split)
    recipe = {
        **read_recipe(str(QUICKSTART)),
        "model_name_or_path": str(directory / "student"),
        "teacher_model_name_or_path": str(directory / "teacher"),
        "dataset_name": str(directory / "data"),
        "output_dir": str(directory / "run"),
        **FIELDS,
        **fields,
    }
    path = directory / "recipe.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in recipe.items()))
    return path


def updates(output: Path) -> list[dict]:
    """The rows of updates in metrics.jsonl so far."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            assert line is lines[-1], f"a torn line in the middle of {path}"
    return [row for row in rows if "loss" in row]


def steps(output: Path) -> list[int]:
    return [row["step"] for row in updates(output)]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in updates(output)]


def valid_checkpoints(output: Path) -> list[int]:
    """The steps of the checkpoints in `output`; each is verified file by file, and one that is not
    valid raises.
    """
    paths = sorted(output.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    for path in paths:
        manifest.verify(path)
    return [int(path.name.split("-")[1]) for path in paths]


def resumes(log: str) -> list[int]:
    """The steps at which a run says that it goes on, in the order in which it says so."""
    found = re.findall(r"resumed from \S*checkpoint-(\d+) at step (\d+)", log)
    assert all(directory == step for directory, step in found), found
    return [int(step) for _, step in found]
