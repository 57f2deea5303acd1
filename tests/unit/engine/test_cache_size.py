"""What a cache is said to hold is what transformers' cache holds, or more."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from gkd_ds.engine.cache_size import estimated, kv_elements_per_token, largest, measured
from gkd_ds.engine.causal_lm import body, cached_forward
from tests.architectures import make_model
from tests.tiny import FAMILIES
from tests.tiny import make_model as make_family

CPU = torch.device("cpu")
RECURRENT = "bamba falcon_h1 jamba lfm2 mamba mamba2 qwen3_next zamba2 minimax kimi_linear".split()
UNEVEN = "gemma3n_text gemma4_text dots3_note_text falcon gpt_bigcode deepseek_v3".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_of_attention(family: str, tokenizer) -> None:
    model = make_family(family, tokenizer=tokenizer)
    cache = DynamicCache()
    body(model)(input_ids=torch.arange(7)[None], cache=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    size = measured(cached_forward(model, 1), CPU)
    assert (size.of(7), size.states) == (held, 0)
    assert estimated(model) == size and kv_elements_per_token(model) == size.per_token


@pytest.mark.parametrize("name", RECURRENT + UNEVEN)
def test_recurrent_states_and_layers_that_differ(name: str) -> None:
    """The estimate without weights is what is measured with them."""
    model = make_model(name, seed=0)
    size = measured(cached_forward(model, 1), CPU)
    assert estimated(model) == size
    assert (size.states > 0) == (name in RECURRENT)
    assert kv_elements_per_token(model) >= size.per_token


@pytest.mark.parametrize("name", ["gpt2", "dbrx", "longcat_flash"])
def test_a_forward_that_asks_for_numbers_is_taken_for_attention(name: str) -> None:
    """GPT-2 looks for its pad token in the ids; experts are chosen by the numbers of a router."""
    model = make_model(name, seed=0)
    size, estimate = measured(cached_forward(model, 1), CPU), estimated(model)
    assert estimate.states == 0 and estimate.per_token == kv_elements_per_token(model)
    assert estimate.per_token >= size.per_token > 0


def test_the_largest_of_sizes_that_differ() -> None:
    config = make_model("gemma3n_text", seed=0).config
    config.intermediate_size = [32, 64, 96, 32]
    assert largest(config, "intermediate_size") == 96
    assert largest(config, "num_attention_heads") == 4
    assert largest(config, "no_such_size") == 0
