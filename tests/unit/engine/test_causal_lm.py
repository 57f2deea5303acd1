"""What is assumed about transformers' models."""

from __future__ import annotations

import pytest
import torch

from gkd_ds.engine.causal_lm import body_forward, check_head, decoder_layers, disable_dropout
from gkd_ds.runtime.errors import InputError
from tests.tiny import FAMILIES, make_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]


@pytest.mark.parametrize("family", FAMILIES)
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
