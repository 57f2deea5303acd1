"""What the scenarios share: where their models and results are, a recipe, and making a trainer of
it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from datasets import Dataset

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.records import Rollout
from gkd_ds.runtime import ranks
from tests import ROOT
from tests.tiny import make_chat_rows

# The worker's arguments; the launcher puts one of its own among them.
ARGUMENTS = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
MATERIALS, RESULTS = map(Path, ARGUMENTS[:2])
SHIPPED = ROOT / "ds_configs"
# By default DeepSpeed keeps parameters of fewer than 100,000 elements whole: of these models, all
# of them.
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
FIELDS = {
    "deepspeed": PARTITIONED,
    "teacher_deepspeed": PARTITIONED,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_new_tokens": 12,
    "logging_steps": 1,
    "save_strategy": "no",
    "overwrite_output_dir": True,
    "disable_tqdm": True,
    "max_steps": 1,
    "ddp_timeout": 240,
}
# Some updates with both sources, and several chunks a pass of the teacher.
PLACES = {"max_steps": 3, "lmbda": 0.5, "score_memory_mb": 1}


def shipped(name: str, block: str = "", **changes) -> dict:
    """A file of ds_configs as it is, but for `changes` in its zero_optimization, or in a `block` of
    that.
    """
    file = json.loads((SHIPPED / name).read_text())
    zero_block = file["zero_optimization"]
    (zero_block[block] if block else zero_block).update(changes)
    return file


def build(
    name: str,
    student="student",
    teacher="teacher",
    rows: int = 24,
    callbacks=None,
    eval_dataset=None,
    trainer_class=GKDTrainer,
    given: dict | None = None,
    **fields,
) -> GKDTrainer:
    """A trainer on the first `rows` chat rows; `student` and `teacher` are directories in
    MATERIALS, or models, and `given` are more arguments of the trainer.
    """
    place = lambda model: str(MATERIALS / model) if isinstance(model, str) else model  # noqa: E731
    config = GKDConfig(output_dir=str(RESULTS / name), **{**FIELDS, **fields})
    dataset = Dataset.from_list(make_chat_rows(rows))
    return trainer_class(
        model=place(student),
        teacher_model=place(teacher),
        args=config,
        train_dataset=dataset,
        eval_dataset=eval_dataset or eval_rows(3),
        callbacks=callbacks,
        **(given or {}),
    )


def eval_rows(count: int) -> Dataset:
    return Dataset.from_list(make_chat_rows(count, seed=9))


def rows_of(name: str) -> list[dict]:
    """The rows of metrics of a run (rank 0 writes them, and only it may read them)."""
    if ranks.rank() != 0:
        return []
    return [
        json.loads(line) for line in (RESULTS / name / "metrics.jsonl").read_text().splitlines()
    ]


def as_json(rollouts: list[Rollout]) -> list[dict]:
    return [{**dataclasses.asdict(rollout), "source": rollout.source.value} for rollout in rollouts]


def train(name: str, **kwargs) -> dict:
    """Train a new trainer: its rows of metrics, and this rank's rollouts of the last window."""
    trainer = build(name, **kwargs)
    trainer.train()
    return {"rows": rows_of(name), "rollouts": as_json(trainer._rollouts)}
