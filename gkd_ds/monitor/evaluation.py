"""Held-out divergence from the teacher: on reference completions, and on the student's own samples.

The first number asks whether the student predicts what the teacher predicts on given text; the
second whether it still does where it has brought itself. Their difference is the exposure bias that
on-policy distillation removes.
"""

from __future__ import annotations

import time

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.pipeline import Learned, Pipeline
from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.runtime import ranks

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
