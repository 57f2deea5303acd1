"""Held-out divergence from the teacher: on reference completions, and on the student's own samples.

The first number asks whether the student predicts what the teacher predicts on given text; the
second whether it still does where it has brought itself. Their difference is the exposure bias that
on-policy distillation removes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.pipeline import Learned, Pipeline
from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

# Sample ids of evaluation lie far above those of training, and do not depend on the step: every
# evaluation draws with the same uniforms, so that two of them differ by the student alone.
EVALUATION_IDS = 1 << 48


def evaluate(pipeline: Pipeline, examples: Examples, config: GKDConfig) -> dict[str, float]:
    """Divergence per completion token (nats), over all ranks. Collective; one teacher pass per kind
    of completion.

    Keys: `loss` on reference completions; with `eval_on_policy` also `on_policy_loss` on the
    student's own samples, their `on_policy_entropy` (nats per token) and `on_policy_mean_length`
    (tokens); `samples`, `runtime` (s).
    """
    started = time.perf_counter()
    count = min(len(examples), config.eval_max_samples or len(examples))
    mine = range(ranks.rank(), count, ranks.world_size())
    reference, own = (
        [_sample(examples, row, source) for row in mine] for source in (Source.DATA, Source.STUDENT)
    )
    loss, _, _ = _divergence(pipeline, pipeline.rollout(reference, {Source.DATA}))
    metrics = {"loss": loss}
    if config.eval_on_policy:
        rollouts = pipeline.rollout(own, {Source.STUDENT})
        loss, entropy, tokens = _divergence(pipeline, rollouts)
        metrics |= {
            "on_policy_loss": loss,
            "on_policy_entropy": entropy,
            "on_policy_mean_length": tokens / count,
        }
    return metrics | {"samples": count, "runtime": time.perf_counter() - started}


def evaluate_sets(
    pipeline: Pipeline, sets: dict[str, Examples], config: GKDConfig, prefix: str
) -> dict[str, float]:
    """`evaluate` several sets: `<prefix>_loss`, or `<prefix>_<name>_loss` for one with a name."""
    metrics = {}
    for name, examples in sets.items():
        of_set = f"{prefix}_{name}" if name else prefix
        values = evaluate(pipeline, examples, config)
        metrics |= {f"{of_set}_{key}": value for key, value in values.items()}
    return metrics


def metric_names(config: GKDConfig) -> list[str]:
    """The keys of what `evaluate` returns, known before."""
    own = (
        ["on_policy_loss", "on_policy_entropy", "on_policy_mean_length"]
        if config.eval_on_policy
        else []
    )
    return ["loss", *own, "samples", "runtime"]


def _sample(examples: Examples, row: int, source: Source) -> Sample:
    return Sample(
        EVALUATION_IDS + row, examples.prompt_ids[row], examples.completion_ids[row], source
    )


def _divergence(pipeline: Pipeline, rollouts: list[Rollout]) -> tuple[float, float, float]:
    """(divergence per token, entropy per token, tokens) of rollouts, over all ranks."""
    learned: Learned = pipeline.measure(rollouts, pipeline.score(rollouts))
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    divergence, entropy, tokens = ranks.all_reduce_sum(
        [sum(learned.divergence), sum(learned.entropy), tokens]
    )
    return divergence / max(tokens, 1), entropy / max(tokens, 1), tokens


def refuse_impossible_evaluation(config: GKDConfig, sets: dict[str, Examples]) -> None:
    """Raise InputError where evaluations are asked for that cannot be made, or cannot choose."""
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
    if config.metric_for_best_model is not None:
        prefixes = [f"eval_{name}_" if name else "eval_" for name in sets]
        known = {prefix + name: None for prefix in prefixes for name in metric_names(config)}
        metric_for_best_model(config, known)


def best_evaluation(
    config: GKDConfig, history: list[dict[str, Any]], counts: Callable[[int], bool]
) -> tuple[int, float] | None:
    """Step and value of the best evaluation in a TrainerState's history, of those whose step
    `counts`; of equal ones the first. None where there is none.
    """
    key = _key_of_best(config)
    found = [
        (entry["step"], entry[key])
        for entry in history
        if key in entry and math.isfinite(entry[key]) and counts(entry["step"])
    ]
    pick = max if config.greater_is_better else min
    return pick(found, key=lambda evaluation: evaluation[1], default=None)


def metric_for_best_model(config: GKDConfig, metrics: dict[str, Any]) -> Any:
    """The one of `metrics` that metric_for_best_model names. Raises InputError for another name."""
    key = _key_of_best(config)
    if key not in metrics:
        raise InputError(
            f"metric_for_best_model {config.metric_for_best_model!r} is none of "
            f"{', '.join(metrics)}; name one of them."
        )
    return metrics[key]


def _key_of_best(config: GKDConfig) -> str:
    name = str(config.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"
