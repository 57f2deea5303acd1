"""What tests with whole runs share: a small recipe, and comparing what two runs did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_jsonl, make_model, make_tokenizer

# Of a row of metrics, what must be the same whenever the same window was computed. Times and speeds
# are left out.
RESULTS = (
    "loss",
    "lr",
    "grad_norm",
    "source",
    "completion_tokens",
    "student_logprob",
    "entropy",
    "skipped",
)
EXACT = 0.0
NVME = pytest.mark.skipif(
    not Path("/usr/include/libaio.h").exists(), reason="NVMe offload needs libaio-dev"
)


def make_models(directory: Path, rows: int = 10) -> dict[str, Any]:
    """A one-layer student, a two-layer teacher, `rows` conversations and three to evaluate on; a
    recipe of them.
    """
    tokenizer = make_tokenizer(vocab_size=300)
    make_jsonl(directory / "data" / "test.jsonl", 3, seed=4)
    make_model("llama", directory / "student", seed=1, hidden=32, layers=1, tokenizer=tokenizer)
    make_model("llama", directory / "teacher", seed=2, hidden=32, layers=2, tokenizer=tokenizer)
    return {
        "model_name_or_path": str(directory / "student"),
        "teacher_model_name_or_path": str(directory / "teacher"),
        "dataset_name": str(make_jsonl(directory / "data" / "train.jsonl", rows, seed=3).parent),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_new_tokens": 8,
        "report_to": "none",
        "do_eval": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "watchdog_timeout": 120,
    }


def rows(run_dir: str | Path, prefix: str = "loss") -> dict[int, dict[str, Any]]:
    """{step: row} of metrics.jsonl, of those rows that have the key `prefix`; each step once."""
    found: dict[int, dict[str, Any]] = {}
    for line in Path(run_dir, "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if prefix in row:
            assert row["step"] not in found, f"step {row['step']} is there twice"
            found[row["step"]] = row
    return found


def assert_same(run_dir: str | Path, reference: str | Path, tolerance: float = EXACT) -> None:
    """Both runs did the same updates, step by step, and none is missing or repeated."""
    ours, theirs = rows(run_dir), rows(reference)
    assert list(ours) == list(theirs) == list(range(1, len(theirs) + 1))
    for step, row in ours.items():
        for name in RESULTS:
            value, expected = row[name], theirs[step][name]
            if isinstance(expected, float) and tolerance:
                assert abs(value - expected) <= tolerance * max(1.0, abs(expected)), (
                    step,
                    name,
                    value,
                    expected,
                )
            else:
                assert value == expected, (step, name, value, expected)


def copy_of(run_dir: str | Path, to: str | Path, checkpoint: int) -> Path:
    """A run that was cut right after it had saved `checkpoint`: that checkpoint and the metrics,
    nothing else.
    """
    run_dir, to = Path(run_dir), Path(to)
    shutil.copytree(run_dir / f"checkpoint-{checkpoint}", to / f"checkpoint-{checkpoint}")
    shutil.copy(run_dir / "metrics.jsonl", to)
    return to
