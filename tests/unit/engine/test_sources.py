"""What cannot be loaded, or is no causal language model, is one sentence before any weight is loaded."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from tests.unit.engine.conftest import ACCEPTED

ROLES = ["student", "teacher"]
KWARGS = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}


def load(models, **how):
    return AutoModelForCausalLM.from_pretrained(models / "student", **how)


def test_what_is_right_is_accepted(read, models):
    assert read() == ACCEPTED
    assert read(student=load(models), teacher=load(models)) == ACCEPTED


# ---- not a causal language model

SIZE = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHER = {
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 384},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 384},
    "bert": SIZE,
    "roberta": SIZE,
    "vit": SIZE | {"intermediate_size": 64},
}
MAKERS = {"bart": AutoModelForSeq2SeqLM, "t5": AutoModelForSeq2SeqLM, "vit": AutoModel}


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("kind", OTHER)
def test_other_kinds_of_models(read, changed, kind, as_object):
    maker = MAKERS.get(kind, AutoModelForMaskedLM)
    model = maker.from_config(AutoConfig.for_model(kind, **OTHER[kind]))
    place = changed()
    model.save_pretrained(place)
    message = read(student=model if as_object else place)
    assert "the student" in message
    what = {"bart": "an encoder-decoder", "t5": "an encoder-decoder", "vit": "language model"}
    assert what.get(kind, "an encoder (") in message


def test_a_bart_that_was_saved_as_a_decoder_is_one(read, changed):
    config = AutoConfig.for_model("bart", **OTHER["bart"], decoder_ffn_dim=32)
    model = AutoModelForCausalLM.from_config(config)
    place = changed()
    model.save_pretrained(place)
    assert read(student=place) == ACCEPTED
    assert read(teacher=model) == ACCEPTED


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_an_object_without_a_language_model_head(read, models, role, kind):
    message = read(**{role: kind.from_pretrained(models / "student")})
    assert f"the {role} is a Llama" in message and "has no language model head" in message


# ---- objects that cannot be used


@pytest.mark.parametrize("role", ROLES)
def test_an_object_on_the_meta_device(read, models, role):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "student"))
    assert f"the {role} has weights without numbers" in read(**{role: model})
    partly = load(models)
    partly.lm_head.to("meta")
    assert "'lm_head.weight' is on the meta device" in read(**{role: partly})


def test_a_student_whose_weights_are_all_frozen(read, models):
    model = load(models).requires_grad_(False)
    assert read(teacher=model) == ACCEPTED
    assert "all weights of the student are frozen" in read(student=model)
    model.lm_head.requires_grad_(True)
    assert read(student=model) == ACCEPTED


def test_a_student_with_two_weights_that_its_configuration_ties(read, models):
    """It would train, and could not be saved."""
    model = AutoModelForCausalLM.from_pretrained(models / "tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert "ties 'lm_head.weight' to 'model.embed_tokens.weight'" in read(student=model)
    assert read(teacher=model) == ACCEPTED
    model.tie_weights()
    assert read(student=model) == ACCEPTED


@pytest.mark.parametrize("as_object", [False, True])
def test_a_student_whose_configuration_could_not_be_saved(read, models, changed, as_object):
    """Its weights would be trained, and lost at the end."""
    place = changed(settings={"output_attentions": True})
    student = AutoModelForCausalLM.from_pretrained(place) if as_object else place
    message = read(student=student)
    assert "could not be saved with what is trained" in message and "output_attentions" in message


@pytest.mark.parametrize("given", ['["</s>"]', '"</s>"', "2.5", "[[2]]"])
def test_stop_tokens_that_are_none(read, changed, given):
    place = changed()
    (place / "generation_config.json").write_text(f'{{"eos_token_id": {given}}}')
    assert "the student's generation config sets eos_token_id to" in read(student=place)


def test_a_stop_token_of_less_than_none_is_none(read, changed):
    place = changed()
    (place / "generation_config.json").write_text('{"eos_token_id": -1}')
    assert read(student=place) == ACCEPTED


def bodies_are_one(model):
    other = copy.deepcopy(model)
    other.model = model.model
    return other


@pytest.mark.parametrize("other", [lambda model: model, copy.copy, bodies_are_one])
def test_student_and_teacher_that_share_weights(read, models, other):
    model = load(models)
    message = read(student=model, teacher=other(model))
    assert "student and teacher share weights ('model.embed_tokens.weight')" in message
    assert read(student=model, teacher=copy.deepcopy(model)) == ACCEPTED


# ---- adapters


def add_adapter(place):
    place.mkdir(exist_ok=True, parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (place / "adapter_config.json").write_text(json.dumps(settings))
    (place / "adapter_model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("by_field", [False, True])
@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_beside_a_whole_model(read, changed, role, by_field):
    place = changed()
    add_adapter(place)
    field = {"student": "model_name_or_path", "teacher": "teacher_model_name_or_path"}[role]
    message = read(**({field: str(place)} if by_field else {role: place}))
    assert "holds an adapter (adapter_config.json) beside a whole model; merge it in" in message


@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_whose_configuration_cannot_be_read(read, tmp_path, role):
    add_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "the configuration of the adapter" in read(**{role: tmp_path / "adapter"})


@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_whose_base_is_not_there(read, tmp_path, role):
    """An adapter alone is accepted (test_adapters.py); its base is loaded as any model is."""
    add_adapter(tmp_path / "adapter")
    assert "org/base" in read(**{role: tmp_path / "adapter"})


# ---- what transformers cannot load


@pytest.mark.parametrize("as_objects", [False, True])
@pytest.mark.parametrize("name, part", [
    ("flash_attention_9", 'attn_implementation="flash_attention_9"'),
    ("flash_attention_2", "installed"),
    ("kernels-community/flash-attn", "installed"),
])  # fmt: skip
def test_attention_that_is_unknown_or_not_installed(read, models, name, part, as_objects):
    objects = {role: load(models) for role in ROLES} if as_objects else {}
    message = read(**objects, attn_implementation=name)
    assert message.startswith("the student") and part in message


def test_the_attention_of_objects_follows_the_configuration(read, models):
    model = load(models)
    assert read(student=model, attn_implementation="eager") == ACCEPTED
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kwargs, part", [
    ({"attn_implementation": "nonsense"}, "nonsense"),
    ({"dtype": "float33"}, "the dtype 'float33'"),
    ({"torch_dtype": "float33"}, "the dtype 'float33'"),
    ({"dtype": "nn"}, "the dtype 'nn'"),
    ({"dtype": "int8"}, "the dtype 'int8'"),
    ({"dtype": 16}, "the dtype 16"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandb"),
    ({"no_such_argument": 1}, "no_such_argument"),
])  # fmt: skip
def test_init_kwargs_that_cannot_be(read, role, kwargs, part):
    message = read(**{KWARGS[role]: kwargs})
    assert message.startswith((f"the {role}", f"GKDConfig field '{KWARGS[role]}'"))
    assert part in message


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("settings, part", [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
    ({"hidden_act": "nonsense"}, "nonsense"),
    ({"dtype": "float33"}, "float33"),
    ({"model_type": "nonsense"}, "nonsense"),
    ({"attn_implementation": "nonsense"}, "nonsense"),
])  # fmt: skip
def test_configurations_that_cannot_be(read, changed, role, settings, part):
    assert part in read(**{role: changed(settings=settings)})


# ---- the run's precision


@pytest.mark.parametrize("dtype, other", [
    ("auto", False),
    ("float32", False),
    (torch.float32, False),
    ("bfloat16", True),
    (torch.float16, True),
])  # fmt: skip
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_not_the_run_s_is_named(read, caplog, dtype, other, name):
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        assert read(teacher_model_init_kwargs={name: dtype}) == ACCEPTED
    assert ("the teacher is loaded in float32, the run's precision" in caplog.text) == other


def test_a_model_in_a_subfolder(read, models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "repository" / "inner")
    fields = {"model_init_kwargs": {"subfolder": "inner"}}
    where = {"model_name_or_path": str(tmp_path / "repository")}
    assert read(student=tmp_path / "repository", **fields, **where) == ACCEPTED
