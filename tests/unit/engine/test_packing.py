"""Sequences one behind the other say what they say alone, padded, and in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd_ds.engine import causal_lm
from gkd_ds.learn.batching import packed_groups
from gkd_ds.records import Rollout, Source, packed_batch, sequence_batch
from gkd_ds.runtime.errors import InputError
from tests.tiny import make_model

CPU = torch.device("cpu")
ROLLOUTS = [
    Rollout(0, Source.DATA, [5, 6, 7, 8], [9, 10, 11], True),
    Rollout(1, Source.DATA, [12], [13, 14], True),
    Rollout(2, Source.DATA, [20, 21, 22, 23, 24, 25], [26], True),
]


@pytest.mark.parametrize(
    "family, attention",
    [(family, "eager") for family in ("llama", "qwen3", "gemma2", "gpt2", "mistral", "phi3")]
    + [(family, "sdpa") for family in ("llama", "qwen3", "gpt2", "mistral", "phi3")],
)
def test_packed_is_padded(family, attention):
    model = make_model(family, None, seed=1).eval()
    model.set_attn_implementation(attention)
    causal_lm.check_packing(model, CPU)
    hidden = {}
    for name, in_one_batch in (("packed", packed_batch), ("padded", sequence_batch)):
        batch = in_one_batch(ROLLOUTS, 0, CPU)
        with torch.no_grad():
            hidden[name] = causal_lm.completion_hidden(model, batch)
        assert batch.tokens_N.tolist() == [9, 10, 11, 13, 14, 26]
    assert (hidden["packed"] - hidden["padded"]).abs().max() < 1e-5
    assert packed_batch(ROLLOUTS, 0, CPU).input_ids_BT.shape == (1, 17)


def test_a_model_that_takes_no_positions_is_refused():
    with pytest.raises(InputError, match="padding_free is not possible for Mamba"):
        causal_lm.check_packing(mamba(), CPU)


def mamba():
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_rank_without_rollouts_runs_one_token():
    batch = packed_batch([], 3, CPU)
    assert batch.input_ids_BT.tolist() == [[3]] and batch.tokens_N.numel() == 0


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 80))
def test_lines_hold_everything_once_within_the_limit(lengths, limit):
    lines = packed_groups(lengths, limit)
    assert sorted(index for line in lines for index in line) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in line) for line in lines]
    assert all(total <= limit or len(line) == 1 for total, line in zip(totals, lines))
    # Two lines that would fit into one are never left apart.
    assert all(a + b > limit for i, a in enumerate(totals) for b in totals[:i])
