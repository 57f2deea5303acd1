"""Objects get the run's precision, as names do. Loading by name: tests/dist/test_loading.py."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gkd_ds import GKDConfig
from gkd_ds.engine import models as engine_models
from gkd_ds.runtime.errors import InputError
from tests.tiny import FAMILIES, MIXTURES, make_model

IDS = torch.arange(3, 40)[None]
NAMES = {torch.float32: {}, torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}


def in_run_of(dtype: torch.dtype, model):
    config = GKDConfig(output_dir="unused", **NAMES[dtype])
    return engine_models.load(model, "student", config, None, {})


def cast_whole(place, dtype):
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(dtype)


def loaded_so(place, dtype):
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype)


@pytest.mark.parametrize("make", [loaded_so, cast_whole])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_an_object_in_16_bits_is_what_a_name_gives(tmp_path, tokenizer, family, dtype, make):
    make_model(family, tmp_path, hidden=32, tokenizer=tokenizer).to(dtype).save_pretrained(tmp_path)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    by_object = in_run_of(torch.float32, make(tmp_path, dtype))
    for name, expected in (*by_name.named_parameters(), *by_name.named_buffers()):
        found = {**dict(by_object.named_parameters()), **dict(by_object.named_buffers())}[name]
        assert found.dtype == expected.dtype and found.equal(expected), name
    with torch.no_grad():
        assert by_object(IDS).logits.equal(by_name(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_is_one_in_fp32_under_16_bits(models, dtype):
    by_name = AutoModelForCausalLM.from_pretrained(models / "student", dtype=dtype)
    by_object = in_run_of(dtype, AutoModelForCausalLM.from_pretrained(models / "student"))
    assert {weight.dtype for weight in by_object.parameters()} == {dtype}
    assert by_object.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert by_object(IDS).logits.equal(by_name(IDS).logits)


def test_tied_weights_stay_tied(models):
    model = AutoModelForCausalLM.from_pretrained(models / "tied", dtype=torch.bfloat16)
    tied = in_run_of(torch.float32, model)
    assert tied is model and tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("as_object", [True, False])
def test_weights_that_are_no_numbers_in_the_run_s_precision_are_refused(
    tmp_path, tokenizer, number: float, as_object: bool
) -> None:
    model = make_model("llama", seed=1, hidden=32, tokenizer=tokenizer)
    model.model.norm.weight.data[3] = number
    if not as_object:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    dtype = torch.float16 if number == 1e6 else torch.float32
    config = GKDConfig(output_dir="unused", **NAMES[dtype])
    with pytest.raises(InputError, match="the teacher .* not finite numbers in .*'model.norm"):
        engine_models.load(model, "teacher", config, None, {"zero_optimization": {"stage": 0}})
