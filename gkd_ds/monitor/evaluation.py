"""Held-out divergence from the teacher: on reference completions, and on the student's own samples.

The first number asks whether the student predicts what the teacher predicts on given text; the
second whether it still does where it has brought itself. Their difference is the exposure bias that
on-policy distillation removes. The caller's own metrics (predictions.py) come on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import EvalLoopOutput, speed_metrics

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.monitor.predictions import Predicted, Wanted, logits_of, predict, texts_of
from gkd_ds.pipeline import Learned, Pipeline
from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

# Sample ids of evaluation lie far above those of training, and do not depend on the step: every
# evaluation draws with the same uniforms, so that two of them differ by the student alone.
EVALUATION_IDS = 1 << 48


def evaluate(
    pipeline: Pipeline, examples: Examples, config: GKDConfig, prefix: str, wanted: Wanted
) -> EvalLoopOutput:
    """Divergence per completion token (nats), over all ranks. Collective; one teacher pass per kind
    of completion.

    Metrics: `<prefix>_loss` on reference completions; with `eval_on_policy` also `on_policy_loss`
    on the student's own samples, their `on_policy_entropy` (nats per token) and
    `on_policy_mean_length` (tokens); `samples`; `runtime` (s) and the like; what the caller
    computes.
    """
    started = time.time()
    count = min(len(examples), config.eval_max_samples or len(examples))
    mine = range(ranks.rank(), count, ranks.world_size())
    reference, own = (
        [_sample(examples, row, source) for row in mine] for source in (Source.DATA, Source.STUDENT)
    )
    rollouts = pipeline.rollout(reference, {Source.DATA})
    learned = pipeline.measure(rollouts, pipeline.score(rollouts))
    metrics = {"loss": _per_token(learned, rollouts)[0], "samples": count}
    size = config.per_device_eval_batch_size
    step = size * ranks.world_size()
    batches = [range(start, min(start + step, count)) for start in range(0, count, step)]
    make = logits_of(pipeline, examples, wanted, size)
    if config.eval_on_policy or wanted.texts(config):
        written = pipeline.rollout(own, {Source.STUDENT})
        if wanted.texts(config):
            make = texts_of(_of_all_ranks([r.completion_ids for r in written], count), examples)
    if config.eval_on_policy:
        learned_own = pipeline.measure(written, pipeline.score(written))
        loss, entropy, tokens = _per_token(learned_own, written)
        metrics |= {
            "on_policy_loss": loss,
            "on_policy_entropy": entropy,
            "on_policy_mean_length": tokens / count,
        }
    predicted = Predicted({})
    if wanted.predictions(config):
        losses = [
            divergence / len(rollout.completion_ids)
            for divergence, rollout in zip(learned.divergence, rollouts)
        ]
        predicted = predict(wanted, config, batches, make, _of_all_ranks(losses, count))
    else:
        for _ in batches:
            wanted.on_step()
    metrics |= predicted.metrics
    metrics = {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in metrics.items()
    }
    metrics |= speed_metrics(prefix, started, count, len(batches))
    return EvalLoopOutput(predicted.predictions, predicted.label_ids, metrics, count)


def metric_names(config: GKDConfig) -> list[str]:
    """The keys of what `evaluate` returns, known before; the caller's own are not."""
    own = (
        ["on_policy_loss", "on_policy_entropy", "on_policy_mean_length"]
        if config.eval_on_policy
        else []
    )
    return ["loss", "samples", *own, "runtime", "samples_per_second", "steps_per_second"]


def _sample(examples: Examples, row: int, source: Source) -> Sample:
    return Sample(
        EVALUATION_IDS + row, examples.prompt_ids[row], examples.completion_ids[row], source
    )


def _of_all_ranks(mine: list, count: int) -> list:
    """One value per row, from those of each rank's rows. Collective."""
    everybody_s = ranks.gather(mine)
    return [everybody_s[row % len(everybody_s)][row // len(everybody_s)] for row in range(count)]


def _per_token(learned: Learned, rollouts: list[Rollout]) -> tuple[float, float, float]:
    """(divergence per token, entropy per token, tokens) of rollouts, over all ranks."""
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    divergence, entropy, tokens = ranks.all_reduce_sum(
        [sum(learned.divergence), sum(learned.entropy), tokens]
    )
    return divergence / max(tokens, 1), entropy / max(tokens, 1), tokens


def refuse_impossible_evaluation(
    config: GKDConfig, sets: dict[str, Examples], has_own_metrics: bool
) -> None:
    """Raise InputError where evaluations are asked for that cannot be made, or cannot choose, as
    far as is known: `has_own_metrics` says that the caller computes more.
    """
    if config.eval_strategy == "no" and not config.eval_on_start:
        return
    if not sets:
        asked = "eval_on_start is set"
        if not config.eval_on_start:
            asked = f"eval_strategy is {config.eval_strategy.value}"
        raise InputError(
            f"{asked} but no eval_dataset is given; pass one to GKDTrainer, or switch evaluation "
            "off."
        )
    if config.metric_for_best_model is not None and not has_own_metrics:
        prefixes = [f"eval_{name}_" if name else "eval_" for name in sets]
        known = {prefix + name: None for prefix in prefixes for name in metric_names(config)}
        metric_for_best_model(config, known)


def best_evaluation(
    config: GKDConfig, history: list[dict[str, Any]], counts: Callable[[int], bool]
) -> tuple[int, float] | None:
    """Step and value of the best evaluation in a TrainerState's history, of those whose step
    `counts`; of equal ones the first. None where there is none.
    """
    key = key_of_best(config)
    found = [
        (entry["step"], entry[key])
        for entry in history
        if key in entry and math.isfinite(entry[key]) and counts(entry["step"])
    ]
    pick = max if config.greater_is_better else min
    return pick(found, key=lambda evaluation: evaluation[1], default=None)


def metric_for_best_model(config: GKDConfig, metrics: dict[str, Any]) -> Any:
    """The one of `metrics` that metric_for_best_model names. Raises InputError for another name."""
    key = key_of_best(config)
    if key not in metrics:
        raise InputError(
            f"metric_for_best_model {config.metric_for_best_model!r} is none of "
            f"{', '.join(metrics)}; name one of them."
        )
    return metrics[key]


def key_of_best(config: GKDConfig) -> str:
    """The metric that decides which evaluation is best, as evaluations have it."""
    name = str(config.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"
