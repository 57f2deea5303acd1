"""A run as a whole: its sources, its events, its resume, and a rollout that raises."""

from __future__ import annotations

import dataclasses
import shutil

from transformers import EarlyStoppingCallback

from gkd_ds.engine import zero
from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Completions, Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from tests.dist.events import EVENT_FIELDS, SHORT_FIELDS, Events, StopsEpochs
from tests.dist.scenarios.common import RESULTS, build, eval_rows, rows_of, train

SOURCES = {
    "data": {"lmbda": 0.0},
    "student": {"lmbda": 1.0},
    "teacher": {"lmbda": 0.0, "seq_kd": True},
    "mixed": {"lmbda": 0.5, "seq_kd": True},
}


def sources() -> dict:
    """Two windows of eight samples, of which the second has only one left: rank 1 has none,
    micro-batch 2 neither.
    """
    fields = {"rows": 9, "gradient_accumulation_steps": 2, "max_steps": 2}
    return {name: train(f"source-{name}", **fields, **case) for name, case in SOURCES.items()}


def resume() -> dict:
    """Four windows at one go, and two of them again from the checkpoint in the middle; with
    dropout, and W&B.

    As with TRL: only train() is told to resume. Without that it is refused, and nothing is written.
    """
    fields = {
        "overwrite_output_dir": False,
        "student": "dropout",
        "teacher": "gpt_neox-t",
        "disable_dropout": False,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lmbda": 0.5,
        "report_to": "wandb",
        "warmup_steps": 1,
        "logging_steps": 3,
    }
    whole = build("resume-whole", **fields)
    whole.train()
    whole_id = whole.tracker.run_id
    if ranks.rank() == 0:
        (RESULTS / "resume-half").mkdir()
        for entry in ("checkpoint-2", "metrics.jsonl", "latest"):
            source = RESULTS / "resume-whole" / entry
            (shutil.copytree if source.is_dir() else shutil.copy)(
                source, RESULTS / "resume-half" / entry
            )
    ranks.barrier()
    events = Events()
    half = build("resume-half", callbacks=[events], **fields)
    entries = lambda: sorted(path.name for path in (RESULTS / "resume-half").iterdir())  # noqa: E731
    before, refused = entries(), ""
    try:
        half.train()
    except InputError as error:
        refused = str(error)
    untouched = entries() == before
    ranks.barrier()
    half.train(resume_from_checkpoint=True)
    return {
        "refused": refused,
        "untouched": untouched,
        "whole": rows_of("resume-whole"),
        "half": rows_of("resume-half"),
        "run_ids": [whole_id, half.tracker.run_id],
        "wandb": sorted(path.name for path in (RESULTS / "resume-half").rglob("*.wandb")),
        "histories": [trainer.state.log_history for trainer in (whole, half)],
        "progress": [dataclasses.asdict(trainer.progress) for trainer in (whole, half)],
        "events": events.seen,
    }


def generation_that_raises() -> dict:
    """An exception inside the gathered rollout; afterwards the same losses, and a window still
    works.
    """
    trainer = build("raises", lmbda=1.0)
    pipeline, examples, student = trainer.pipeline, trainer.inputs.train, trainer.student
    samples = [
        Sample(row, examples.prompt_ids[row], examples.completion_ids[row], Source.DATA)
        for row in range(ranks.rank(), 6, 2)
    ]
    of_data = pipeline.rollout(samples, {Source.DATA})

    def measure() -> list[float]:
        return pipeline.measure(of_data, pipeline.score(of_data)).divergence

    def partitioned() -> int:
        return sum(zero.is_partitioned(parameter) for parameter in trainer.model.parameters())

    before, partitioned_before = measure(), partitioned()

    def generate(samples: list[Sample]) -> Completions:
        with pipeline.rollout_engine.window():
            return pipeline.rollout_engine.generate(samples, pipeline.sampling, lambda: None)

    raised = ""
    try:
        generate([Sample(0, [10**6], [], Source.STUDENT)])  # no such token
    except IndexError as error:
        raised = str(error)
    after, partitioned_after = measure(), partitioned()
    pipeline.learn(of_data, pipeline.score(of_data), count_tokens(of_data))
    applied = student.update()
    return {
        "raised": raised,
        "losses": [before, after, measure()],
        "partitioned": [partitioned_before, partitioned_after],
        "applied": applied,
        "written": len(generate(samples).token_ids),
    }


def callbacks() -> dict:
    """Two epochs of three windows; then a run that does not improve on the second of two sets,
    which EarlyStoppingCallback ends.
    """
    events, short_events = Events(), Events()
    build("events", rows=12, callbacks=[events], lmbda=0.0, **EVENT_FIELDS).train()
    fields = {**SHORT_FIELDS, "per_device_train_batch_size": 1}
    short = build("events-short", rows=12, callbacks=[short_events], lmbda=0.0, **fields)
    short.train()
    stopped = build(
        "early",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1), StopsEpochs()],
        **{**EVENT_FIELDS, "eval_steps": 1, "save_steps": 1},
        learning_rate=0.0,
        load_best_model_at_end=True,
        eval_dataset={"few": eval_rows(2), "more": eval_rows(5)},
        metric_for_best_model="more_loss",
        lmbda=0.0,
        eval_on_policy=False,
    )
    stopped.train()
    state = stopped.state
    return {
        "events": {"long": events.seen, "short": short_events.seen},
        "logged": [entry["loss"] for entry in short.state.log_history if "loss" in entry],
        "losses": [row["loss"] for row in rows_of("events-short") if "loss" in row],
        "early": [
            state.global_step,
            state.max_steps,
            state.best_global_step,
            state.best_model_checkpoint,
        ],
        "best": state.best_metric,
        "early rows": rows_of("early"),
        "event rows": rows_of("events"),
    }
