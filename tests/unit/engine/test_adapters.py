"""Adapters: what the user gave, merging that leaves no trace, names of a merged model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import adapters
from gkd_ds.runtime.errors import InputError
from tests.tiny import make_model

peft = pytest.importorskip("peft")


def lora(**fields):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **fields})


def wrapped_model(**fields):
    """A model with an adapter that says something."""
    model = make_model("llama", None, seed=1)
    wrapped = adapters.Adapter(config=lora(**fields)).attach(model, trainable=True)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model, wrapped


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize(
    "form", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": False}]
)
def test_merging_says_the_same_and_leaves_no_trace(form):
    model, _ = wrapped_model(**form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = logits(model)
    with adapters.merged(model):
        together = logits(model)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.merged
    assert not layer.merged
    assert (apart - together).abs().max() < 1e-5 * apart.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), apart)


def test_merging_leaves_no_trace_when_sampling_raises():
    model, _ = wrapped_model()
    before = model.state_dict()["model.layers.0.self_attn.q_proj.base_layer.weight"].clone()
    with pytest.raises(RuntimeError), adapters.merged(model):
        raise RuntimeError
    after = model.state_dict()["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert torch.equal(after, before) and not model.model.layers[0].self_attn.q_proj.merged


def test_without_is_the_base_and_what_is_trained_stays_so():
    model, wrapped = wrapped_model()
    base = logits(make_model("llama", None, seed=1))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with adapters.without(wrapped):
        assert torch.equal(logits(model), base)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("names", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_adapters_of_embeddings_and_head_are_refused(names, field):
    config = lora(**{"target_modules": ["q_proj"], field: ["v_proj", names]})
    model = make_model("llama", None, seed=1, tie_word_embeddings=False)
    with pytest.raises(InputError, match="plain matrix; leave it out"):
        adapters.Adapter(config=config).attach(model, trainable=True)


def test_an_adapter_that_does_not_fit_is_named():
    with pytest.raises(InputError, match="does not fit LlamaForCausalLM .*no_such_layer"):
        config = lora(target_modules=["no_such_layer"])
        adapters.Adapter(config=config).attach(make_model("llama", None, seed=1), trainable=True)


def test_an_adapter_that_is_not_whole_is_refused(tmp_path):
    """peft would make up what is missing, and leave out what has no place."""
    _, wrapped = wrapped_model()
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    first = next(iter(held))

    def attach() -> None:
        base = make_model("llama", None, seed=1)
        adapters.Adapter(directory=str(tmp_path)).attach(base, trainable=True)

    attach()
    save_file({name: held[name] for name in held if name != first}, file)
    with pytest.raises(InputError, match=f"1 is missing .'{first}'"):
        attach()
    save_file({**held, first.replace("layers.0", "layers.7"): held[first].clone()}, file)
    with pytest.raises(InputError, match="1 is without a place .*layers.7"):
        attach()


@pytest.mark.parametrize(
    "given",
    [peft.PrefixTuningConfig(num_virtual_tokens=3), peft.IA3Config(), peft.LoHaConfig()],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_than_lora_are_refused_by_name(given):
    with pytest.raises(InputError, match=f"{given.peft_type.value}, and only LoRA"):
        adapters.split("student", given)


def test_what_is_no_configuration_of_peft_is_refused():
    with pytest.raises(InputError, match="peft_config is a dict"):
        adapters.split("student", {"r": 4})


def test_two_adapters_are_one_too_many(tmp_path):
    model, wrapped = wrapped_model()
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has an adapter already"):
        adapters.split(wrapped, lora())


def test_a_saved_adapter_names_its_base(tmp_path):
    model, wrapped = wrapped_model()
    wrapped.peft_config["default"].base_model_name_or_path = "org/base"
    wrapped.save_pretrained(tmp_path)
    base, adapter = adapters.split(str(tmp_path), None)
    assert base == "org/base" and adapter.directory == str(tmp_path)


def test_the_fields_are_trl_s():
    assert adapters.of_fields(GKDConfig()) is None
    config = GKDConfig(use_peft=True, lora_r=8, lora_target_modules=["all-linear"], use_dora=True)
    made = adapters.of_fields(config)
    assert (made.r, made.target_modules, made.use_dora) == (8, "all-linear", True)
    assert made.task_type == "CAUSAL_LM"


def test_one_copy_serves_only_a_teacher_that_is_the_base():
    config, adapter = GKDConfig(), adapters.Adapter(config=lora())
    assert adapters.is_base(config, "a", adapter, "a", None)
    assert not adapters.is_base(config, "a", None, "a", None)  # the whole student is trained
    assert not adapters.is_base(config, "a", adapter, "b", None)
    assert not adapters.is_base(config, "a", adapter, "a", adapter)
    other = GKDConfig(teacher_model_init_kwargs={"revision": "main"})
    assert not adapters.is_base(other, "a", adapter, "a", None)


def test_a_frozen_adapter_of_the_student_is_refused(tmp_path):
    _, wrapped = wrapped_model()
    wrapped.save_pretrained(tmp_path)
    base = make_model("llama", None, seed=1)
    frozen = peft.PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(InputError, match="the student's adapter is frozen"):
        adapters.Adapter(model=frozen).attach(base, trainable=True)
    adapters.Adapter(model=frozen).attach(base, trainable=False)
