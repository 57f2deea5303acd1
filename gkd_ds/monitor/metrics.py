"""From what a window did to a record of metrics: sums over all ranks, with one all-reduce."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd_ds.engine.counters import Counters
from gkd_ds.monitor import guards
from gkd_ds.monitor.sinks import Record
from gkd_ds.pipeline import Learned, Pipeline
from gkd_ds.records import Rollout, Source
from gkd_ds.runtime import ranks


def update_record(
    rollouts: list[Rollout],
    learned: Learned,
    pipeline: Pipeline,
    before: Counters,
    **more: float,
) -> tuple[Record, dict[str, float]]:
    """Everything about one window but its step, epoch, learning rate, gradient norm and total time;
    and the sums over all ranks that it is made of, also those of `more`. Collective.

    Divergences, log-probabilities and entropies are means per completion token in nats; lengths are
    in tokens. Times are this rank's seconds, counts this rank's; all else is over all ranks.
    """
    counters = pipeline.counters
    local = _local_sums(rollouts, learned) | more
    local["decoded_rows"] = pipeline.decoded_sequences
    local["drafted"], local["accepted"] = pipeline.drafted_tokens, pipeline.accepted_tokens
    sums = dict(zip(local, ranks.all_reduce_sum(list(local.values()))))
    tokens = max(sums["tokens"], 1)
    seconds = pipeline.seconds
    record: Record = {
        "loss": sums["divergence"] / tokens,
        "source": {source.value: int(sums[f"{source.value}/completions"]) for source in Source},
        "completion_tokens": int(sums["tokens"]),
        "mean_completion_length": sums["tokens"] / max(sums["completions"], 1),
        "unfinished_share": 1 - sums["stopped"] / max(sums["completions"], 1),
        "student_logprob": sums["student_logprob"] / tokens,
        "teacher_logprob": sums["teacher_logprob"] / tokens,
        "entropy": sums["entropy"] / tokens,
    }
    for source in Source:
        if sums[f"{source.value}/tokens"]:
            record[f"loss/{source.value}"] = (
                sums[f"{source.value}/divergence"] / sums[f"{source.value}/tokens"]
            )
    own = max(sums["student/completions"], 1)
    record["student/mean_length"] = sums["student/tokens"] / own
    record["student/finished_share"] = sums["student/stopped"] / own
    record["student/looping_share"] = sums["student/looping"] / own
    generated = sums["student/tokens"] + sums["teacher/tokens"]
    record |= {
        "perf/rollout_s": seconds["rollout"],
        "perf/score_s": seconds["score"],
        "perf/learn_s": seconds["learn"],
        "perf/update_s": seconds["update"],
        "perf/rollout_tokens_per_s": generated / seconds["rollout"] if generated else 0.0,
        "perf/score_tokens_per_s": sums["tokens"] / seconds["score"],
        "perf/learn_tokens_per_s": sums["tokens"] / seconds["learn"],
        # Every token but a completion's first is decoded; the first comes out of the prompt's
        # forward.
        "perf/decoded_rows_per_token": sums["decoded_rows"] / max(generated, 1),
        "perf/micro_batches": learned.micro_batches,
        "perf/padded_tokens": learned.padded_tokens,
        "perf/student_gathers": counters.student_gathers - before.student_gathers,
        "perf/student_bytes": counters.student_bytes - before.student_bytes,
        "perf/teacher_passes": counters.teacher_passes - before.teacher_passes,
        "perf/teacher_decode_passes": counters.teacher_decode_passes - before.teacher_decode_passes,
        "perf/teacher_bytes": counters.teacher_bytes - before.teacher_bytes,
    }
    if pipeline.config.rollout_speculation != "none":
        # Tokens of drafts that were drawn again, of all of them, and how many they were.
        record["perf/accepted_share"] = sums["accepted"] / max(sums["drafted"], 1)
        record["perf/tokens_saved"] = int(sums["accepted"])
    return record, sums


def _local_sums(rollouts: list[Rollout], learned: Learned) -> dict[str, float]:
    sums = dict.fromkeys(("tokens", "completions", "stopped"), 0.0)
    sums["input_tokens"] = sum(len(rollout) for rollout in rollouts)
    for name in ("divergence", "student_logprob", "teacher_logprob", "entropy"):
        sums[name] = sum(getattr(learned, name))
    for source in Source:
        indices = [index for index, rollout in enumerate(rollouts) if rollout.source is source]
        part = {
            "tokens": sum(len(rollouts[index].completion_ids) for index in indices),
            "completions": len(indices),
            "stopped": sum(rollouts[index].stopped for index in indices),
        }
        for name, value in part.items():
            sums[name] += value
            sums[f"{source.value}/{name}"] = value
        sums[f"{source.value}/divergence"] = sum(learned.divergence[index] for index in indices)
    own = [rollout.completion_ids for rollout in rollouts if rollout.source is Source.STUDENT]
    sums["student/looping"] = guards.looping_share(own) * len(own)
    return sums


def what_was_bad(record: Record) -> str:
    """Where the NaN or Inf of a skipped update was (guards.BAD_KINDS)."""
    if not math.isfinite(record["teacher_logprob"]):
        return "teacher targets"
    return "gradients" if math.isfinite(record["loss"]) else "loss"


def window_stats(record: Record) -> guards.WindowStats:
    """What the guards look at, from the record of an update."""
    return guards.WindowStats(
        step=record["step"],
        mean_length=record["student/mean_length"],
        finished_share=record["student/finished_share"],
        looping_share=record["student/looping_share"],
        entropy=record["entropy"],
    )


def suspects(
    rollouts: list[Rollout], learned: Learned, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Record]:
    """Up to `count` rollouts of each rank whose divergence is not finite; where no rank has any,
    the first of this rank. Collective.
    """
    bad = [
        index
        for index, divergence in enumerate(learned.divergence)
        if not math.isfinite(divergence)
    ]
    mine = rollout_records(rollouts, learned, tokenizer, count, bad)
    everyone = [record for records in ranks.gather(mine) for record in records]
    return everyone or rollout_records(rollouts, learned, tokenizer, count)


def rollout_records(
    rollouts: list[Rollout],
    learned: Learned,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    indices: list[int] | None = None,
) -> list[Record]:
    """Up to `count` rollouts of this rank as text, beside what both models think of them.

    Those at `indices`; by default what the student sampled first, then the teacher's, then the
    data's. Log-probabilities and divergence are means per token, in nats.
    """
    if indices is None:
        order = list(Source)
        indices = sorted(
            range(len(rollouts)), key=lambda index: order.index(rollouts[index].source)
        )
    records = []
    for index in indices[:count]:
        rollout = rollouts[index]
        tokens = max(len(rollout.completion_ids), 1)
        records.append(
            {
                "sample_id": rollout.sample_id,
                "source": rollout.source.value,
                "prompt": tokenizer.decode(rollout.prompt_ids),
                "completion": tokenizer.decode(rollout.completion_ids),
                "teacher_logprob": learned.teacher_logprob[index] / tokens,
                "student_logprob": learned.student_logprob[index] / tokens,
                "divergence": learned.divergence[index] / tokens,
            }
        )
    return records


def python_numbers(value: Any) -> Any:
    """`value` with numbers and lists in place of what NumPy and torch have for them, as files take
    it.
    """
    if isinstance(value, dict):
        return {key: python_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [python_numbers(item) for item in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value
