"""Scenarios that need the engines, all in one launch because starting ranks costs more than running
them.

    PYTHONPATH=. deepspeed --num_accelerators 2 --module tests.dist.worker MATERIALS RESULTS
    [SCENARIO ...] PYTHONPATH=. python -m tests.dist.worker MATERIALS RESULTS seed_example rollouts

MATERIALS is what `tests.dist.materials` made. Every rank writes RESULTS/<scenario>.<rank>.json:
what the scenario returned, or the traceback of what it raised. The tests beside this file compare
those with plain torch.
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from tests import ROOT

# Before anything else is imported: gkd_ds must run where none of these is installed (peft needs
# accelerate).
ABSENT = ("trl", "accelerate", "peft")
sys.modules.update(dict.fromkeys(ABSENT))

import deepspeed
import torch
from datasets import Dataset
from deepspeed.comm import comms_logger
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.checkpoint import store
from gkd_ds.checkpoint.engine_files import save_engine
from gkd_ds.engine import accelerator, process, zero
from gkd_ds.engine.counters import Counters
from gkd_ds.monitor.guards import TrainingStopped
from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher import nvme
from gkd_ds.train import leave
from tests.dist.events import EVENT_FIELDS, SHORT_FIELDS, Events, StopsEpochs
from tests.dist.materials import FAMILY_PAIRS
from tests.tiny import MIXTURES, make_chat_rows

SHIPPED = ROOT / "ds_configs"
MATERIALS, RESULTS = (
    Path(argument) for argument in [a for a in sys.argv[1:] if not a.startswith("--local_rank")][:2]
)

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
    **fields,
) -> GKDTrainer:
    """A trainer on the first `rows` chat rows; `student` and `teacher` are directories in
    MATERIALS, or models.
    """
    place = lambda model: str(MATERIALS / model) if isinstance(model, str) else model  # noqa: E731
    config = GKDConfig(output_dir=str(RESULTS / name), **{**FIELDS, **fields})
    dataset = Dataset.from_list(make_chat_rows(rows))
    return GKDTrainer(
        model=place(student),
        teacher_model=place(teacher),
        args=config,
        train_dataset=dataset,
        eval_dataset=eval_dataset or eval_rows(3),
        callbacks=callbacks,
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


# ---------------------------------------------------------------------------------------- the scenarios


def seed_example() -> dict:
    """The issue's example program, nothing else set; and the trained student's logits beside its
    export.
    """
    results = {}
    for name in ("names", "objects"):
        student, teacher = str(MATERIALS / "qwen2-student"), str(MATERIALS / "qwen2-teacher")
        tokenizer = AutoTokenizer.from_pretrained(student)
        if name == "objects":
            student, teacher = (
                AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher)
            )
        # With the rows of seed 0 one uniform falls within 4e-8 of the border between two tokens:
        # too close for fp32 to tell, so a batch of one and a batch of two write different tokens
        # from there on.
        rows = make_chat_rows(4, seed=5)
        dataset = Dataset.from_dict({"messages": [row["messages"] for row in rows]})
        out = f"seed-{name}"
        config = GKDConfig(
            output_dir=str(RESULTS / out), per_device_train_batch_size=2 // ranks.world_size()
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            processing_class=tokenizer,
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        output = trainer.train()
        results[name] = {
            "rows": rows_of(out),
            "steps": output.global_step,
            "train_loss": output.training_loss,
        }
        with torch.no_grad(), zero.gathered_parameters(trainer.student.engine, Counters()):
            logits = trainer.model(input_ids=torch.arange(3, 40)[None]).logits
        if ranks.rank() == 0:
            save_file({"logits": logits}, RESULTS / f"{out}-logits.safetensors")
    return results


# AdamW's first update is the sign of the gradient unless epsilon is of its size: then it shows the
# gradient.
UPDATE_FIELDS = {
    "lmbda": 0.0,
    "weight_decay": 0.1,
    "max_grad_norm": 0.02,
    "adam_epsilon": 1e-4,
    "divergence_temperature": 1.5,
}
UPDATES = {
    "accumulation-1": {"student": "student"},
    "accumulation-3": {
        "student": "student",
        "gradient_accumulation_steps": 3,
        "gradient_checkpointing": False,
    },
    "untied": {"student": "untied", "gradient_accumulation_steps": 3},
    "stage-2": {
        "student": "student",
        "gradient_accumulation_steps": 3,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "stage-0": {"student": "student", "deepspeed": {"zero_optimization": {"stage": 0}}},
}


def update() -> dict:
    """One clipped AdamW update on the data's completions, which are of very different lengths."""
    return {
        name: train(f"update-{name}", **UPDATE_FIELDS, **case) for name, case in UPDATES.items()
    }


def rollouts() -> dict:
    """Samples 0..18 through both rollout engines, so many at a time. Rank 1 has fewer than rank 0."""
    results = {}
    for engine in ("gather", "sharded"):
        trainer = build(f"rollouts-{engine}", student="wide", rollout_engine=engine)
        pipeline, examples = trainer.pipeline, trainer._train_examples
        assert trainer.student.rollout_engine == engine
        # A random model seldom writes one particular token: with these it stops after twenty tokens
        # on average.
        pipeline.sampling = dataclasses.replace(
            pipeline.sampling, stop_ids=tuple(range(20, 40)), max_new_tokens=30
        )
        mine = range(19) if ranks.world_size() == 1 else (range(10), range(10, 19))[ranks.rank()]
        samples = [Sample(row, examples.prompt_ids[row], [], Source.STUDENT) for row in mine]
        for size in (1, 3, 8):
            (calls,) = ranks.all_reduce_max([-(-len(samples) // size)])
            written = []
            for call in range(calls):
                written += pipeline.rollout(
                    samples[call * size : (call + 1) * size], {Source.STUDENT}
                )
            results[f"{engine}/{size}"] = {
                rollout.sample_id: rollout.completion_ids for rollout in written
            }
    return results


def hybrid_engine() -> dict:
    """`auto` and `hybrid` for a family that DeepSpeed has kernels for; and one that it runs
    natively, beside `gather`.
    """
    said = _Said()
    logging.getLogger("gkd_ds.learn.student").addHandler(said)
    auto = build("hybrid-auto", rollout_engine="auto")
    logging.getLogger("gkd_ds.learn.student").removeHandler(said)
    results = {"auto": auto.student.rollout_engine, "said": said.messages}
    try:
        build("hybrid-refused", rollout_engine="hybrid")
    except InputError as error:
        results["refused"] = str(error)
    for engine in ("gather", "hybrid"):
        trainer = build(f"hybrid-{engine}", "qwen2-student", "qwen2-teacher", rollout_engine=engine)
        # The second window has three samples for the four places of each rank, so rank 1 has none.
        prompts = trainer._train_examples.prompt_ids
        sampling = dataclasses.replace(trainer.pipeline.sampling, stop_ids=tuple(range(20, 60)))
        written = []
        for rows in (range(8), range(3)):
            mine = rows[:4] if ranks.rank() == 0 else rows[4:]
            samples = [Sample(row, prompts[row], [], Source.STUDENT) for row in mine]
            written.append(trainer.student.generate(samples, sampling, None).token_ids)
        results[engine] = [trainer.student.rollout_engine, *written]
        trainer.train()
        results[f"{engine} rows"] = rows_of(f"hybrid-{engine}")
    return results


class _Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def families() -> dict:
    """One on-policy window of every family, with a teacher of another family, width and depth."""
    return {
        student: train(
            f"family-{student}",
            student=f"{student}-s",
            teacher=f"{teacher}-t",
            lmbda=1.0,
            temperature=1.0,
        )
        for student, teacher in FAMILY_PAIRS.items()
    }


def counts() -> dict:
    return {
        n: train(
            f"counts-{n}", per_device_train_batch_size=1, gradient_accumulation_steps=n, lmbda=1.0
        )
        for n in (1, 4, 8)
    }


PLACES = {"max_steps": 3, "lmbda": 0.5, "score_memory_mb": 1}


def teacher_places() -> dict:
    return {
        place: train(
            f"teacher-{place}", **PLACES, teacher_deepspeed=shipped(f"teacher_{place}.json")
        )
        for place in ("resident", "cpu")
    }


def scale_features() -> dict:
    """DeepSpeed's switches for large clusters, each beside the same run without it; and mixtures of
    experts.
    """
    profile = {"enabled": True, "profile_step": 1, "output_file": str(RESULTS / "flops.txt")}
    files = {
        "plain": PARTITIONED,
        "shipped": shipped("student_zero3.json"),
        "offload_optimizer": shipped("student_zero3_offload_optimizer.json"),
        "hpz": shipped("student_zeropp.json", zero_hpz_partition_size=2),
        "comms_logger": {**PARTITIONED, "comms_logger": {"enabled": True, "prof_all": True}},
        "flops_profiler": {**PARTITIONED, "flops_profiler": profile},
        "states_on_host": PARTITIONED,
    }
    results = {}
    for name, file in files.items():
        on_host = name == "states_on_host"
        trainer = build(f"scale-{name}", **PLACES, deepspeed=file, offload_optimizer_states=on_host)
        comms_logger.reset_data()
        trainer.train()
        results[name] = {
            "rows": rows_of(f"scale-{name}"),
            "second copies": sum(
                p.ds_secondary_tensor is not None for p in trainer.model.parameters()
            ),
            "optimizer offloaded": bool(trainer.student.engine.optimizer.offload_optimizer),
            "shard": sum(p.ds_tensor.numel() for p in trainer.model.parameters()),
            "bytes moved": trainer.student.counters.optimizer_bytes,
            "recorded": {
                name: sum(calls for calls, *_ in sizes.values())
                for name, sizes in comms_logger.comms_dict.items()
            },
        }
        deepspeed.comm.configure(enabled=False)  # it is one for the whole process
    for family in MIXTURES:
        for engine in ("gather", "sharded"):
            how = {"student": family, "max_steps": 2, "lmbda": 1.0, "rollout_engine": engine}
            results[f"{family}/{engine}"] = train(f"scale-{family}-{engine}", **how)
    return results


def teacher_on_nvme() -> dict:
    """A teacher whose shards are large enough for DeepSpeed to swap (1 MB), resident and on NVMe."""
    place = {"block": "offload_param", "nvme_path": str(RESULTS / "nvme")}
    files = {
        "resident": shipped("teacher_resident.json"),
        "nvme": shipped("teacher_nvme.json", **place),
    }
    results, trainers = {}, {}
    for where, file in files.items():
        trainer = build(f"nvme-{where}", teacher="teacher-large", **PLACES, teacher_deepspeed=file)
        trainer.train()
        results[where], trainers[where] = rows_of(f"nvme-{where}"), trainer
    logits = []
    for trainer in trainers.values():
        hidden_NE = trainer.pipeline.score(trainer._rollouts).hidden_NE
        with trainer.teacher.whole_head() as head:
            logits.append(accelerator.logits(hidden_NE, head.weight_VE, head.bias_V))
    results["logits"] = [logits[0].numel(), torch.equal(*logits)]
    results["away"] = {"auto": shards_away(trainer, trainer._rollouts)[0]}
    swapped = sorted((RESULTS / "nvme").rglob("rank0/**/*.swp"))
    results["files"] = [path.stat().st_size for path in swapped]
    results["file"] = str(swapped[0])

    # What something else may do to the files: rank 0's are damaged, and no rank gets a target.
    def score_with(damage, meanwhile: bool) -> str:
        damage_once = functools.cache(lambda: damage(swapped[0]) if ranks.rank() == 0 else None)
        ranks.barrier()
        if not meanwhile:
            damage_once()
        ranks.barrier()
        try:
            trainer.teacher.score(trainer._rollouts, damage_once if meanwhile else lambda: None)
        except nvme.SwapFileError as error:
            return str(error)
        return "scored"

    results["rewritten"] = score_with(_rewrite, meanwhile=True)
    for name, damage in (("truncated", _truncate), ("deleted", Path.unlink)):
        results[name] = score_with(damage, meanwhile=False)
    try:
        small = shipped("teacher_nvme.json", **place, buffer_count=2)
        build("nvme-small", teacher="teacher-large", teacher_deepspeed=small)
    except InputError as error:
        results["too few buffers"] = str(error)
    least = shipped("teacher_nvme.json", **place, buffer_count=4)
    least = build("nvme-least", teacher="teacher-large", **PLACES, teacher_deepspeed=least)
    results["away"]["least"], least_NE = shards_away(least, trainer._rollouts)
    results["least gives the same"] = torch.equal(hidden_NE, least_NE)
    return results


def shards_away(
    trainer: GKDTrainer, rollouts: list[Rollout]
) -> tuple[list[list[int]], torch.Tensor]:
    """For each layer that scoring has released, the shards of every layer that are nowhere but on
    the drive.
    """
    seen: list[list[int]] = []
    layers = [slot.streamed.layer for slot in trainer.teacher.slots]

    def look() -> None:
        seen.append([sum(map(zero.is_only_on_nvme, layer.parameters())) for layer in layers])

    return seen, trainer.teacher.score(rollouts, look).hidden_NE


def _rewrite(path: Path) -> None:
    """The same number of bytes, as another run with the same models writes them."""
    path.write_bytes(bytes(path.stat().st_size))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def optimizer_on_nvme() -> dict:
    """A student whose optimizer states are large enough to be swapped, beside the same in memory."""
    place = {"block": "offload_optimizer", "nvme_path": str(RESULTS / "nvme-optimizer")}
    files = {
        "memory": shipped("student_zero3.json"),
        "nvme": shipped("student_zero3_nvme_optimizer.json", **place),
    }
    results = {}
    for where, file in files.items():
        trainer = build(f"optimizer-{where}", student="teacher-large", **PLACES, deepspeed=file)
        trainer.train()
        results[where] = rows_of(f"optimizer-{where}")
    try:  # as an agreed stop would
        store.save(
            RESULTS / "nvme-saved", 1, lambda where: save_engine(trainer.student.engine, where), {}
        )
    except store.CheckpointError as error:
        results["saved"] = str(error)
    results["bytes"] = sum(
        path.stat().st_size for path in (RESULTS / "nvme-optimizer").rglob("*.swp")
    )
    return results


def evaluation() -> dict:
    """An evaluation of the untrained student, and the rollouts that it measured: references, and
    own samples.
    """
    trainer, seen = build("evaluation"), []
    rollout = trainer.pipeline.rollout

    def noted_rollout(*given) -> list[Rollout]:
        seen.append(rollout(*given))
        return seen[-1]

    trainer.pipeline.rollout = noted_rollout
    metrics = trainer.evaluate()
    return {"metrics": metrics, "loss": as_json(seen[0]), "on_policy_loss": as_json(seen[1])}


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
    pipeline, examples, student = trainer.pipeline, trainer._train_examples, trainer.student
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
    impossible = [Sample(0, [10**6], [], Source.STUDENT)]
    raised = ""
    try:
        student.generate(impossible, pipeline.sampling, None)
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
        "written": len(student.generate(samples, pipeline.sampling, None).token_ids),
    }


def precision() -> dict:
    fields = {"lmbda": 0.0, "max_steps": 3, "learning_rate": 1e-3}
    return {"fp32": train("fp32", **fields), "bf16": train("bf16", bf16=True, **fields)}


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


class WeightsAfterEachUpdate(TrainerCallback):
    """A digest of the student's whole weights after every window. Collective, like the events
    themselves.
    """

    def __init__(self):
        self.digests: list[str] = []
        self.trainer: GKDTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        weights = zero.full_state_dict(self.trainer.student.engine, self.trainer.model)
        digest = hashlib.sha256()
        for name, tensor in sorted((weights or {}).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        self.digests.append(digest.hexdigest())


def _with_nan(name: str, where: str, bad_windows: set[int], **fields) -> dict:
    """NaN on rank 1 only, in the teacher's targets or in the loss, in some windows."""
    watch = WeightsAfterEachUpdate()
    trainer = watch.trainer = build(name, max_steps=4, lmbda=0.5, callbacks=[watch], **fields)
    score, loss = trainer.teacher.score, trainer.student.loss

    def spoilt() -> bool:
        return ranks.rank() == ranks.world_size() - 1 and trainer.state.global_step in bad_windows

    def spoil_targets(*given):
        targets = score(*given)
        if spoilt():
            targets.hidden_NE[0] = float("nan")
        return targets

    def spoil_loss(*given):
        total, *per_token = loss(*given)
        return (total * float("nan") if spoilt() else total, *per_token)

    if where == "targets":
        trainer.teacher.score = spoil_targets
    else:
        trainer.student.loss = spoil_loss
    stopped = ""
    try:
        trainer.train()
    except TrainingStopped as error:
        stopped = str(error)
    return {"digests": watch.digests, "rows": rows_of(name), "stopped": stopped}


def faults() -> dict:
    return {
        "targets": _with_nan("nan-targets", "targets", {1}),
        "loss": _with_nan("nan-loss", "loss", {0, 2}),
        "always": _with_nan("nan-always", "targets", {0, 1, 2, 3}, max_bad_updates=2),
        "stage 2": _with_nan(
            "nan-stage-2", "loss", {1}, deepspeed={"zero_optimization": {"stage": 2}}
        ),
        "stage 0": _with_nan(
            "nan-stage-0", "loss", {1}, deepspeed={"zero_optimization": {"stage": 0}}
        ),
    }


def blocked_imports() -> dict:
    """Runs last: what was imported in spite of the block above."""
    return {
        "imported": [
            name for name, module in sys.modules.items() if module and name.split(".")[0] in ABSENT
        ]
    }


SCENARIOS = [
    seed_example,
    update,
    rollouts,
    hybrid_engine,
    families,
    counts,
    teacher_places,
    scale_features,
    teacher_on_nvme,
    optimizer_on_nvme,
    evaluation,
    sources,
    resume,
    generation_that_raises,
    precision,
    callbacks,
    faults,
    blocked_imports,
]


def main(wanted: list[str]) -> None:
    process.start(GKDConfig(output_dir=str(RESULTS / "unused"), ddp_timeout=FIELDS["ddp_timeout"]))
    for scenario in SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        started = time.monotonic()
        try:
            outcome = {"result": scenario()}
        except Exception:
            traceback.print_exc()
            outcome = {"error": traceback.format_exc()}
        seconds = time.monotonic() - started
        path = RESULTS / f"{scenario.__name__}.{ranks.rank()}.json"
        path.write_text(json.dumps({**outcome, "seconds": seconds}))
        print(f"=== rank {ranks.rank()}: {scenario.__name__} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if not a.startswith("--local_rank")][2:])
    leave(0)
