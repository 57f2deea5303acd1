"""Completions that were written once before, with the same uniforms, are read instead of decoded.

A token is the inverse CDF of one uniform. Where the uniform is the one of the last epoch, so is the
token, unless the student's distribution has moved across it. So one forward over prompt and old
completion tells how far the new completion is the same, and the token at which it first is not;
decoding goes on from there. What comes out is what the plain loop writes with these uniforms: the
draft decides how fast it comes, and nothing else.

Shapes: B sequences, N tokens of their drafts one behind the other, n of these at a time, V
vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gkd_ds.engine.causal_lm import LogitTransform, completion_hidden
from gkd_ds.learn.batching import length_groups
from gkd_ds.learn.student import Student
from gkd_ds.records import Completions, Rollout, Sample, Source, sequence_batch
from gkd_ds.rollout.batch import PREFILL_TOKENS
from gkd_ds.rollout.decoder import Decoder
from gkd_ds.rollout.sampling import Sampling, draw, uniforms

LOGITS_BYTES = 64 * 2**20  # of one chunk
FORWARD_OVERHEAD_TOKENS = 64  # one more forward costs about as much as so many padded tokens


def complete(
    student: Student,
    decoder: Decoder,
    samples: list[Sample],
    sampling: Sampling,
    heartbeat: Callable[[], None],
) -> Completions:
    """Complete `samples`, in their order, from their drafts as far as these lead. The student's
    parameters are whole.
    """
    drafts = [_cut(sample, sampling) for sample in samples]
    begun = verified(student, samples, drafts, sampling, heartbeat)
    stopped = [_is_stopped(ids, sampling) for ids in begun]
    rest = [
        index
        for index, ids in enumerate(begun)
        if not stopped[index] and len(ids) < sampling.limit(samples[index].prompt_ids)
    ]
    decoded = decoder.complete(
        [samples[index] for index in rest], sampling, heartbeat, [begun[index] for index in rest]
    )
    token_ids = list(begun)
    for place, index in enumerate(rest):
        token_ids[index], stopped[index] = decoded.token_ids[place], decoded.stopped[place]
    accepted = sum(_common(draft, ids) for draft, ids in zip(drafts, begun))
    return replace(
        decoded,
        token_ids=token_ids,
        stopped=stopped,
        drafted_tokens=sum(map(len, drafts)),
        accepted_tokens=accepted,
    )


@torch.no_grad()
def verified(
    student: Student,
    samples: list[Sample],
    drafts: list[list[int]],
    sampling: Sampling,
    heartbeat: Callable[[], None],
) -> list[list[int]]:
    """How each completion begins: with the leading tokens of its draft that are drawn again, and
    the first that is drawn otherwise.
    """
    begun: list[list[int]] = [[] for _ in samples]
    drafted = [index for index, draft in enumerate(drafts) if draft]
    rollouts = [
        Rollout(samples[i].sample_id, Source.STUDENT, samples[i].prompt_ids, drafts[i], False)
        for i in drafted
    ]
    lengths = [len(rollout) for rollout in rollouts]
    for group in length_groups(lengths, PREFILL_TOKENS, FORWARD_OVERHEAD_TOKENS, student.switch):
        some = [rollouts[place] for place in group]
        drawn = iter(_drawn(student, some, sampling).tolist())
        for place, rollout in zip(group, some):
            draft = rollout.completion_ids
            tokens = [next(drawn) for _ in draft]
            begun[drafted[place]] = tokens[: _common(draft, tokens) + 1]
        heartbeat()
    return begun


def _drawn(student: Student, rollouts: list[Rollout], sampling: Sampling) -> Tensor:
    """What the student draws at each position of the completions, given what stands before it:
    `[N]`.
    """
    batch = sequence_batch(rollouts, sampling.pad_id, student.device)
    hidden_ND = completion_hidden(student.model, batch)
    head = student.model.get_output_embeddings()
    transform = LogitTransform.of(student.model.config)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    ids = [rollout.sample_id for rollout in rollouts]
    uniform_BP = uniforms(sampling.seed, ids, max(lengths), student.device)
    uniform_N = torch.cat([uniform_BP[b, :length] for b, length in enumerate(lengths)])
    size = max(1, LOGITS_BYTES // (4 * sampling.vocabulary))
    tokens = []
    for hidden_nD, uniform_n in zip(hidden_ND.split(size), uniform_N.split(size)):
        logits_nV = transform.apply_(head(hidden_nD))[:, : sampling.vocabulary]
        tokens.append(draw(logits_nV, uniform_n, sampling.temperature))
    return torch.cat(tokens)


def _cut(sample: Sample, sampling: Sampling) -> list[int]:
    """The draft up to its first stop token and the sample's limit, which may be others than when it
    was written.
    """
    draft = sample.draft_ids[: sampling.limit(sample.prompt_ids)]
    stop = next((place for place, id in enumerate(draft) if id in sampling.stop_ids), len(draft))
    return draft[: stop + 1]


def _is_stopped(ids: list[int], sampling: Sampling) -> bool:
    return bool(ids) and ids[-1] in sampling.stop_ids


def _common(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same."""
    return len(os.path.commonprefix([one, other]))
