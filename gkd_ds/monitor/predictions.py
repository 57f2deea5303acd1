"""The caller's own metrics: transformers' EvalPrediction, made batch by batch.

`preprocess_logits_for_metrics` gets the student's logits of a batch, and what it returns is all
that is kept of them; `compute_metrics` gets that of the whole set, on every rank. With
`batch_eval_metrics` it gets one batch after the other, and nothing is kept. As in TRL, a batch is
padded on the left, position t predicts the token at t + 1, and labels are -100 on prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import EvalLoopContainer, nested_concat
from transformers.trainer_utils import EvalPrediction

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.monitor.metrics import python_numbers
from gkd_ds.pipeline import Pipeline
from gkd_ds.records import Rollout, Source, sequence_batch
from gkd_ds.runtime import ranks

IGNORED = -100
Batch = tuple[Any, Tensor, Tensor]  # predictions, labels, inputs; on the CPU


@dataclass(frozen=True)
class Wanted:
    """What the caller wants of an evaluation beside the divergence: the trainer's arguments
    `compute_metrics` and `preprocess_logits_for_metrics`, something to do after each batch, and
    whether to return what was predicted.
    """

    compute: Callable[..., dict[str, float]] | None
    preprocess: Callable[[Tensor, Tensor], Any] | None
    on_step: Callable[[], None]
    returned: bool = False

    def predictions(self, config: GKDConfig) -> bool:
        """Whether anybody looks at predictions."""
        return not config.prediction_loss_only and (self.returned or self.compute is not None)

    def texts(self, config: GKDConfig) -> bool:
        """Whether the predictions are what the student writes, not its logits on references."""
        return self.predictions(config) and config.predict_with_generate


@dataclass(frozen=True)
class Predicted:
    """The metrics; and, where they were kept, predictions and labels as numpy arrays (or, without
    `eval_do_concat_batches`, lists of them).
    """

    metrics: dict[str, float]
    predictions: Any = None
    label_ids: Any = None


def predict(
    wanted: Wanted,
    config: GKDConfig,
    batches: list[range],
    make: Callable[[range], Batch],
    losses: list[float],
) -> Predicted:
    """`make` every batch of rows, and let the caller compute. Collective.

    `losses` are the divergences of all rows, for `include_for_metrics`.
    """
    kept = [EvalLoopContainer(config.eval_do_concat_batches, IGNORED) for _ in range(3)]
    metrics: dict[str, float] = {}

    def compute(batch: tuple, rows: slice, **more: bool) -> dict[str, float]:
        predictions, labels, inputs = batch
        given = EvalPrediction(
            predictions,
            labels,
            inputs=inputs if "inputs" in config.include_for_metrics else None,
            losses=np.array(losses[rows]) if "loss" in config.include_for_metrics else None,
        )
        return wanted.compute(given, **more)

    for rows in batches:
        batch = make(rows)
        if wanted.compute is not None and config.batch_eval_metrics:
            is_last = rows is batches[-1]
            metrics = compute(batch, slice(rows.start, rows.stop), compute_result=is_last)
        if wanted.returned or not config.batch_eval_metrics:
            for container, part in zip(kept, batch):
                container.add(part)
                container.to_cpu_and_numpy()
        wanted.on_step()
    whole = tuple(container.get_arrays() for container in kept)
    if wanted.compute is not None and not config.batch_eval_metrics:
        metrics = compute(whole, slice(None))
    metrics = python_numbers(metrics or {})
    return Predicted(metrics, *(whole[:2] if wanted.returned else ()))


def logits_of(
    pipeline: Pipeline, examples: Examples, wanted: Wanted, size: int
) -> Callable[[range], Batch]:
    """Makes batches of the student's logits on references, each rank `size` rows of them."""

    def make(rows: range) -> Batch:
        mine = [reference(examples, row) for row in rows[ranks.rank() * size :][:size]]
        (width,) = ranks.all_reduce_max([max(map(len, mine), default=1)])
        logits = _logits(pipeline, mine, width)
        part = None
        if mine:
            labels = [[IGNORED] * len(r.prompt_ids) + r.completion_ids for r in mine]
            labels = _padded(labels, IGNORED, width).to(logits.device)
            if wanted.preprocess is not None:
                logits = wanted.preprocess(logits, labels)
            inputs = [r.prompt_ids + r.completion_ids for r in mine]
            inputs = _padded(inputs, pipeline.sampling.pad_id, width)
            part = _on_cpu((logits, labels, inputs))
        whole, *others = [part for part in ranks.gather(part) if part is not None]
        for other in others:
            whole = nested_concat(whole, other, padding_index=IGNORED)
        return whole

    return make


def texts_of(written: list[list[int]], examples: Examples) -> Callable[[range], Batch]:
    """Makes batches of what the student has written for every row, beside the references."""

    def make(rows: range) -> Batch:
        prompts, completions = examples.prompt_ids, examples.completion_ids
        of_rows = ([ids[row] for row in rows] for ids in (written, completions, prompts))
        return tuple(_padded(ids, IGNORED) for ids in of_rows)

    return make


def reference(examples: Examples, row: int) -> Rollout:
    """A row of the data as it stands there."""
    return Rollout(row, Source.DATA, examples.prompt_ids[row], examples.completion_ids[row], True)


def _padded(sequences: list[list[int]], value: int, width: int | None = None) -> Tensor:
    """`[B, width]`: padded on the left to `width`, or on the right to the longest."""
    if width is not None:
        return torch.tensor([[value] * (width - len(ids)) + ids for ids in sequences])
    longest = max(map(len, sequences))
    return torch.tensor([ids + [value] * (longest - len(ids)) for ids in sequences])


def _logits(pipeline: Pipeline, rollouts: list[Rollout], width: int) -> Tensor:
    """The student's logits, `[B, width, W]`, of sequences that are padded on the left."""
    student = pipeline.student
    # Short rows and long ones do not share a batch where they would change each other.
    sides: list[list[int]] = [[], []]
    for row, rollout in enumerate(rollouts):
        sides[student.switch is not None and len(rollout) > student.switch].append(row)
    logits: list[Tensor | None] = [None] * len(rollouts)
    with student.evaluating(), pipeline.phase("evaluation"):
        for side in sides if student.switch is not None else sides[:1]:
            some = [rollouts[row] for row in side]
            batch = sequence_batch(some, pipeline.sampling.pad_id, student.device)
            logits_BTW = student.logits(batch)
            for row, logits_TW in zip(side, logits_BTW):
                length = len(rollouts[row])
                logits[row] = F.pad(logits_TW[:length], (0, 0, width - length, 0))
    return torch.stack(logits) if logits else logits_BTW[:0]


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return type(tree)((key, _on_cpu(value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        return type(tree)(_on_cpu(value) for value in tree)
    return tree.detach().cpu()
