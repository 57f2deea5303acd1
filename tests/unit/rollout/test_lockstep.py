"""Decoding without padding: the tokens of one sequence at a time, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_ds.engine.causal_lm import cached_forward, whole_forward
from gkd_ds.records import Completions
from gkd_ds.rollout.batch import SYNC_EVERY
from gkd_ds.rollout.decoding import decode
from gkd_ds.rollout.lockstep import LockstepBatch, WholeLockstepBatch
from gkd_ds.rollout.sampling import Sampling
from tests.tiny import make_model
from tests.unit.rollout.reference import one_by_one, prompts

CPU = torch.device("cpu")
STOPS = tuple(range(20, 33))
SAMPLING = Sampling(30, 1.0, seed=1, stop_ids=STOPS, pad_id=0, vocabulary=384)
BATCHES = {
    "own cache": (cached_forward, LockstepBatch),
    "to the end": (cached_forward, WholeLockstepBatch),
    "no cache": (whole_forward, LockstepBatch),
}


def run(
    model, given, sampling=SAMPLING, sample_ids=None, places=None, how="own cache"
) -> Completions:
    forward_of, batch_class = BATCHES[how]
    ids = list(range(len(given))) if sample_ids is None else sample_ids
    forward = forward_of(model, sampling.vocabulary)
    return decode(forward, given, ids, sampling, CPU, places, batch_class=batch_class)


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    tokens = one_by_one(model, prompts(16), SAMPLING)
    assert len({len(ids) for ids in tokens}) > 6, "the case is ragged"
    return tokens


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("batch, places", [(1, None), (3, None), (16, None), (16, 5)])
def test_tokens_are_the_same_in_any_batch(model, expected, how: str, batch: int, places) -> None:
    given = prompts(16)
    for first in range(0, 16, batch):
        rows = list(range(first, min(first + batch, 16)))
        got = run(model, [given[i] for i in rows], SAMPLING, rows, places, how)
        assert got.token_ids == [expected[i] for i in rows]
        assert got.stopped == [expected[i][-1] in STOPS for i in rows]


def test_stop_tokens_in_a_prompt_stop_nothing(model) -> None:
    """A prompt that is longer than its neighbour's is walked through token by token."""
    given = [[5, 6], [*STOPS, 7, 8], [9, *STOPS[:5]] * 3]
    assert run(model, given).token_ids == one_by_one(model, given, SAMPLING)


def test_limits_differ_between_sequences(model) -> None:
    given, sampling = prompts(9), replace(SAMPLING, stop_ids=(), max_length=35)
    got = run(model, given, sampling, places=4)
    assert [len(p) + len(ids) for p, ids in zip(given, got.token_ids)] == [
        min(35, len(p) + 30) for p in given
    ]
    assert got.token_ids == one_by_one(model, given, sampling)


@pytest.mark.parametrize("how", BATCHES)
def test_no_forward_is_beyond_the_positions_of_the_model(tokenizer, how: str) -> None:
    """GPT-2 has a table of 512 positions and no more."""
    model = make_model("gpt2", tokenizer=tokenizer)
    sampling = replace(SAMPLING, stop_ids=(), max_length=512, max_new_tokens=512)
    got = run(model, [[5] * 505, [6] * 500], sampling, how=how)
    assert [len(tokens) for tokens in got.token_ids] == [7, 12]


def test_a_short_prompt_does_not_walk_along_a_much_longer_one(model) -> None:
    calls = []

    def counted(ids, positions, cache):
        calls.append(tuple(ids.shape))
        return cached_forward(model, 384)(ids, positions, cache)

    given, sampling = (
        [[5] * 200, [6] * 3, [7] * 6],
        replace(SAMPLING, max_new_tokens=8, stop_ids=()),
    )
    got = decode(counted, given, [0, 1, 2], sampling, CPU, batch_class=LockstepBatch)
    assert got.token_ids == one_by_one(model, given, sampling)
    assert calls[0] == (1, 200) and (2, 3) in calls and len(calls) < 30


def test_who_has_stopped_leaves_the_cache(model, expected) -> None:
    lengths = sorted(len(ids) for ids in expected)
    left, waited = (run(model, prompts(16), how=how) for how in ("own cache", "to the end"))
    assert left.token_ids == waited.token_ids
    assert left.decoded_sequences < 0.8 * waited.decoded_sequences, lengths


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_ranks_that_must_keep_step_call_the_model_equally_often(model, how, count: int) -> None:
    """Partitioned parameters: a rank with few prompts, or none, runs along with the others."""
    forward_of, batch_class = BATCHES[how]
    forward, calls, rounds = forward_of(model, 384), [], 20
    answers = iter([True, True] * rounds + [False])  # whether to go on, whether to refill

    def counted(*args):
        calls.append(1)
        return forward(*args)

    given, ids = prompts(count), list(range(count))
    agree = lambda here: next(answers)  # noqa: E731
    got = decode(counted, given, ids, SAMPLING, CPU, 2, agree=agree, batch_class=batch_class)
    assert got.token_ids == one_by_one(model, given, SAMPLING)
    assert len(calls) == rounds * (1 + SYNC_EVERY)
