"""What is assumed about transformers' models."""

from __future__ import annotations

import pytest
import torch

from gkd_ds.engine.causal_lm import (
    body_forward,
    check_head,
    decoder_layers,
    disable_dropout,
    refusing,
)
from gkd_ds.runtime.errors import InputError
from tests.architectures import make_model as make_architecture
from tests.tiny import FAMILIES, UNUSUAL, make_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]


@pytest.mark.parametrize("family", FAMILIES + UNUSUAL)
def test_families(family: str, tokenizer) -> None:
    """Each has a head and layers that are found; without dropout, training mode computes what
    evaluation does.
    """
    model = make_model(family, tokenizer=tokenizer, layers=3)
    check_head(model, "student", CPU)
    assert len(decoder_layers(model)) == 3
    with torch.no_grad():
        expected = body_forward(model, IDS)
        disable_dropout(model.train())
        torch.testing.assert_close(body_forward(model, IDS), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_is_there_until_it_is_disabled(family: str, tokenizer) -> None:
    model = make_model(family, tokenizer=tokenizer).train()
    with torch.no_grad():
        assert (body_forward(model, IDS) - body_forward(model, IDS)).abs().max() > 1e-3


def test_logits_computed_in_another_way_are_refused(tokenizer) -> None:
    model = make_model("gemma2", tokenizer=tokenizer)
    model.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", output.logits * 1.5)
    )
    with pytest.raises(
        InputError, match="the teacher .Gemma2ForCausalLM. computes its logits in a way"
    ):
        check_head(model, "teacher", CPU)


@pytest.mark.parametrize(
    "name, path",
    [
        ("llama4_text", "model.layers"),  # under another prefix than the class names
        ("mllama", "model.layers"),
        ("gemma3", "model.language_model.layers"),  # beside a tower for images
        ("git", "git.encoder.layer"),  # in one list of modules with it, and equally deep
        ("phi4_multimodal", "model.layers"),  # beside a deeper one for sounds
        ("gemma3n_text", "model.layers"),  # beside small modules, as many as layers
        ("longcat_flash", "model.layers"),  # half as many as the configuration counts
        ("bart", "model.decoder.layers"),
        ("falcon", "transformer.h"),
    ],
)
def test_the_layers_are_found_among_other_lists(name: str, path: str) -> None:
    model = make_architecture(name, seed=0)
    assert decoder_layers(model) is model.get_submodule(path)
    check_head(model, "teacher", CPU)


def test_a_model_without_layers_is_refused() -> None:
    model = make_architecture("llama", seed=0)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("error", [KeyError("k"), AttributeError("no\nsuch"), RuntimeError("{x}")])
def test_a_check_says_what_the_model_raised_in_one_sentence(tokenizer, error: Exception) -> None:
    model = make_model("llama", tokenizer=tokenizer)

    def fail(*given):
        raise error

    model.model.register_forward_hook(fail)
    with pytest.raises(InputError) as caught:
        check_head(model, "student", CPU)
    said = str(caught.value)
    assert "\n" not in said and f"({type(error).__name__}: {str(error).splitlines()[0]})" in said


def test_a_lack_of_memory_is_not_the_architecture_s_fault(tokenizer) -> None:
    with pytest.raises(torch.OutOfMemoryError), refusing("x", "y"):
        raise torch.OutOfMemoryError("too little")
