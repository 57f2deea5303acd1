"""Files that are not those of the model which their configuration describes are refused by name,
and nothing else is.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.unit.engine.conftest import ACCEPTED

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
MATRIX = "model.layers.1.mlp.up_proj.weight"
MODULE = "model.layers.0.self_attn.q_proj"


def without(*names: str):
    return lambda held: {name: weight for name, weight in held.items() if name not in names}


def plus(*names: str):
    return lambda held: held | {name: torch.zeros(2, 2) for name in names}


def renamed(change):
    return lambda held: {change(name): weight for name, weight in held.items()}


def and_renamed(change):
    return lambda held: renamed(change)({n: w.clone() for n, w in held.items()}) | held


# ---- missing weights


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", [HEAD, EMBEDDING, NORM, MATRIX])
def test_a_missing_weight_is_named(read, changed, role, name):
    place = changed(without(name))
    assert f"the weights of the {role} '{place}'" in (message := read(**{role: place}))
    assert f"1 weight is missing ('{name}')" in message


def test_of_many_some_are_named(read, changed):
    message = read(student=changed(lambda held: without(*held)(held) | plus("x.y")({})))
    assert "21 weights are missing ('lm_head.weight', 'model.embed_tokens.weight', " in message
    assert "1 weight is without a place in it ('x.y')" in message


@pytest.mark.parametrize("change", [
    renamed(lambda name: f"module.{name}"),
    renamed(lambda name: f"_orig_mod.{name}"),
    renamed(lambda name: f"base_model.model.{name}"),
    renamed(lambda name: f"student.{name}" if "layers.1" in name else name),
    renamed(lambda name: name.replace(".weight", ".qweight") if "_proj" in name else name),
    renamed(lambda name: name.replace("q_proj", "q_proj.base_layer")),
])  # fmt: skip
def test_weights_under_other_names_are_missing(read, changed, change):
    message = read(teacher=changed(change))
    assert "missing" in message and "without a place in it" in message


@pytest.mark.parametrize("save", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_that_was_saved_without_its_head(read, changed, models, save):
    place = changed()
    save.from_pretrained(models / "student").save_pretrained(place)
    assert "missing ('lm_head.weight')" in read(student=place)


def test_weights_that_are_tied_to_each_other_and_both_missing(read, changed):
    assert EMBEDDING in read(student=changed(without(EMBEDDING), name="tied"))


# ---- weights of another shape


@pytest.mark.parametrize("settings, name", [
    ({"vocab_size": 400}, HEAD),
    ({"intermediate_size": 96}, "model.layers.0.mlp.down_proj.weight"),
    ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight"),
])  # fmt: skip
def test_a_weight_of_another_shape_is_named_with_both(read, changed, settings, name):
    message = read(teacher=changed(settings=settings))
    assert f"of another shape ('{name}' is [" in message and "] and should be [" in message


def test_no_init_kwarg_makes_up_for_it(read, changed):
    place, kwargs = changed(settings={"vocab_size": 400}), {"ignore_mismatched_sizes": True}
    assert "of another shape" in read(student=place, model_init_kwargs=kwargs)


# ---- weights beyond those of the model


@pytest.mark.parametrize("change, settings", [
    (plus(f"{MODULE}.bias"), {}),
    (plus(f"{MODULE}.weight_scale_inv"), {}),
    (plus(f"{MODULE}.lora_A.default.weight"), {}),
    (plus("lm_head.bias"), {}),
    (and_renamed(lambda name: f"ema.{name}"), {}),
    (and_renamed(lambda name: name.replace("layers.1.", "layers.2.")), {}),
    (lambda held: held, {"num_hidden_layers": 1}),
])  # fmt: skip
def test_weights_that_would_change_the_model_are_refused(read, changed, change, settings):
    assert "without a place in it" in read(student=changed(change, settings))


NEXT = {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("change, settings", [
    (plus("score.weight", "v_head.summary.weight"), {}),
    (plus("model.mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"), {}),
    (plus("model.layers.0.self_attn.masked_bias"), {}),
    (and_renamed(lambda name: name.replace("layers.1.", "layers.2.")), NEXT),
])  # fmt: skip
def test_others_are_named_in_a_warning(read, changed, caplog, change, settings):
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        assert read(teacher=changed(change, settings)) == ACCEPTED
    assert "LlamaForCausalLM has no use for these weights: '" in caplog.text


def test_fewer_layers_may_be_asked_for(read, models):
    assert read(model_init_kwargs={"num_hidden_layers": 1}) == ACCEPTED
    assert "missing" in read(model_init_kwargs={"num_hidden_layers": 3})


# ---- what is not meant to be in a file, or may have another name there


def the_whole(model: AutoModelForCausalLM, place: Path) -> None:
    model.save_pretrained(place)


def without_a_head(model: AutoModelForCausalLM, place: Path) -> None:
    model.model.save_pretrained(place)


@pytest.mark.parametrize("save", [the_whole, without_a_head])
def test_a_tied_head_is_not_missing(read, changed, models, save, caplog):
    place = changed(name="tied")
    save(AutoModelForCausalLM.from_pretrained(models / "tied"), place)
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        assert read(student=place) == ACCEPTED
    assert "weights" not in caplog.text


@pytest.mark.parametrize("change", [
    plus("model.layers.0.self_attn.rotary_emb.inv_freq"),
    lambda held: without(EMBEDDING)(held) | {HEAD: held[EMBEDDING]},
    lambda held: held | {HEAD: held[EMBEDDING].clone()},
    lambda held: held | {HEAD: held[EMBEDDING] + 1},
])  # fmt: skip
def test_what_transformers_knows_to_load_is_right(read, changed, change, caplog):
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        assert read(teacher=changed(change, name="tied")) == ACCEPTED
    assert "weights" not in caplog.text


def test_so_is_what_key_mapping_names(read, changed):
    place = changed(renamed(lambda name: f"module.{name}"))
    kwargs = {"key_mapping": {"^module.": ""}}
    assert read(student=place, model_init_kwargs=kwargs) == ACCEPTED
