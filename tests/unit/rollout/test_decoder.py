"""How a model decodes is found out by trying: every architecture in the first way that is right."""

from __future__ import annotations

import logging

import pytest
import torch

from gkd_ds.records import Sample, Source
from gkd_ds.rollout.decoder import WAYS, Decoder
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime.errors import InputError
from tests.architectures import VOCABULARY, make_model
from tests.tiny import FAMILIES, MIXTURES
from tests.tiny import make_model as make_family
from tests.unit.rollout.reference import one_by_one, prompts

CPU = torch.device("cpu")
GREEDY = Sampling(20, 0.0, 1, tuple(range(20, 26)), 0, VOCABULARY)
# Where each architecture ends up, a few of every kind of cache and layer.
EXPECTED = {
    "padded": "bloom falcon mpt gpt_neo gpt_neox_japanese llama4_text gemma3_text gemma3n_text "
    "gemma4_text mistral deepseek_v3 longcat_flash hrm_text",
    "in lockstep": "bamba bart deepseek_v32 deepseek_v4 falcon_h1 falcon_mamba glm_moe_dsa "
    "granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 marian nemotron_h olmo_hybrid "
    "qwen3_5_text qwen3_next trocr zamba zamba2 zaya",
    "in lockstep to the end": "minimax",
    "in lockstep and without a cache": "openai-gpt recurrent_gemma rwkv",
}
WAY_OF = {name: way for way, names in EXPECTED.items() for name in names.split()}


def decoder(model, memory_mb: int | None = None) -> Decoder:
    return Decoder(model, "student", "use another", VOCABULARY, CPU, memory_mb)


def complete(decoder: Decoder, given: list[list[int]], sampling: Sampling = GREEDY):
    samples = [Sample(i, prompt, [], Source.STUDENT) for i, prompt in enumerate(given)]
    return decoder.complete(samples, sampling, lambda: None)


@pytest.mark.parametrize("name", sorted(WAY_OF))
def test_every_kind_of_cache_writes_what_its_full_forward_says(name: str) -> None:
    model = make_model(name, seed=0)
    found = decoder(model, memory_mb=1)
    assert found.way.name == WAY_OF[name]
    given = prompts(6, longest=24, vocabulary=VOCABULARY)
    assert complete(found, given).token_ids == one_by_one(model, given, GREEDY)


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "jamba", "minimax", "recurrent_gemma"])
def test_it_is_transformers_generate(name: str) -> None:
    model, given = make_model(name, seed=1), prompts(3, 5, 20, VOCABULARY)
    got = complete(decoder(model), given).token_ids
    for prompt, tokens in zip(given, got, strict=True):
        theirs = model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(GREEDY.stop_ids),
            pad_token_id=0,
        )
        assert tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_decodes_in_the_fast_way_and_nothing_is_said(
    family: str, dtype: torch.dtype, tokenizer, caplog
) -> None:
    model = make_family(family, tokenizer=tokenizer, layers=4, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        assert decoder(model).way is WAYS[0]
    assert not caplog.records


def test_a_slower_way_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        decoder(make_model("mamba", seed=0))
    (record,) = caplog.records
    said = record.getMessage()
    assert "the student (MambaForCausalLM) decodes in lockstep" in said and "slower" in said


@pytest.mark.parametrize("name", ["xlnet", "cpmant"])
def test_a_model_whose_tokens_see_what_follows_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        decoder(make_model(name, seed=0))
    said = str(caught.value)
    assert said.startswith("the student (") and said.endswith("; use another.")
    assert "cannot write completions" in said and "\n" not in said


def test_whatever_the_model_raises_becomes_a_sentence(model) -> None:
    class Odd(type(model)):
        pass

    odd = Odd(model.config).eval()
    odd.model.register_forward_hook(lambda *given: {}["no such key"])
    recovered = []
    with pytest.raises(InputError, match="KeyError: 'no such key'"):
        Decoder(odd, "teacher", "x", 384, CPU, None, recover=lambda: recovered.append(1))
    assert len(recovered) == len(WAYS)


def test_memory_bounds_the_sequences_at_a_time() -> None:
    """Mamba's states do not grow; Llama's keys and values do."""
    found = decoder(make_model("mamba", seed=0), memory_mb=1)
    assert found.cache_size.per_token == 0 and found.cache_size.states > 0
    fit = 2**20 // (found.cache_size.states * 4)
    assert found._places([[5] * 3, [5] * 3000], GREEDY) == fit > 1
    found = decoder(make_model("llama", seed=0), memory_mb=1)
    assert found.cache_size.states == 0
    assert found._places([[5] * 3, [5] * 30], GREEDY) == 2**20 // (50 * 4) // (
        found.cache_size.per_token
    )
    assert found._places([[5] * 10**6], GREEDY) == 1
    assert decoder(make_model("llama", seed=0))._places([[5]], GREEDY) is None
