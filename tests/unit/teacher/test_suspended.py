"""A model's forward that stops at its layers: what comes out, for any model, and what goes wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gkd_ds.engine.causal_lm import body_forward, decoder_layers
from gkd_ds.teacher.suspended import Call, Slot, SuspendedForward
from tests.architectures import make_model

# Layers that return tuples, several residual streams, per-layer inputs, something handed from layer
# to layer, layers that are called more than once, and plain ones.
KINDS = (
    "bamba bloom cpmant deepseek_v4 dory falcon falcon_h1 gemma3 gemma3n_text gemma4 gemma4_text "
    "git glm_moe_dsa got_ocr2 gpt_neo gpt_neox_japanese hrm_text hy_v4 jamba llama llama4_text "
    "longcat_flash mamba mllama mpt mvp openai-gpt qwen3_next reformer rwkv trocr xlnet xlstm zamba2 "
    "zaya"
).split()


@pytest.fixture
def threads() -> int:
    """How many there are without a forward that waits: other tests may have left some."""
    return threading.active_count()


class Streamed(nn.Module):
    """Runs a module over the calls of all chunks, and notes that it did."""

    def __init__(self, module: nn.Module, log: list[Streamed]):
        super().__init__()
        self.module, self.log = module, [log]

    def forward(self, *, calls: list[Call]) -> list[Any]:
        self.log[0].append(self)
        return [self.module(*call.args, **call.kwargs) for call in calls]


def put_slots(model: nn.Module) -> list[Streamed]:
    """The log of what ran."""
    log: list[Streamed] = []
    embedding, layers = model.get_input_embeddings(), decoder_layers(model)
    model.set_input_embeddings(Slot(Streamed(embedding, log)))
    for index, layer in enumerate(layers):
        layers[index] = Slot(Streamed(layer, log))
    return log


def stream(model: nn.Module, chunks: list[Tensor]) -> list[Tensor]:
    forwards = [SuspendedForward(lambda ids=ids: body_forward(model, ids)) for ids in chunks]
    stops = [forward.go_on() for forward in forwards]
    while isinstance(stops[0], Call):
        answers = stops[0].slot.streamed(calls=stops)
        stops = [forward.go_on(answer) for forward, answer in zip(forwards, answers, strict=True)]
    return stops


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_layer_by_layer_is_the_models_own_forward(name: str, threads: int) -> None:
    model = make_model(name, seed=0, more_layers=1)
    draw = torch.Generator().manual_seed(1)
    chunks = [torch.randint(3, 160, shape, generator=draw) for shape in ((2, 21), (1, 1), (3, 9))]
    expected = [body_forward(model, ids) for ids in chunks]
    layers = list(decoder_layers(model))
    log = put_slots(model)
    for got, wanted in zip(stream(model, chunks), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert {unit.module for unit in log} >= set(layers), "all of them are streamed"
    assert threading.active_count() == threads, "nobody waits any more"
    for ids, wanted in zip(chunks, expected):  # nobody is suspended: a slot runs its module
        torch.testing.assert_close(body_forward(model, ids), wanted, rtol=0, atol=0)


def test_the_model_may_ask_a_slot_for_its_modules_attributes() -> None:
    model = make_model("llama", seed=0)
    layers = list(decoder_layers(model))
    put_slots(model)
    for slot, layer in zip(decoder_layers(model), layers, strict=True):
        assert slot.hidden_size == layer.hidden_size and slot.self_attn is layer.self_attn
    with pytest.raises(AttributeError, match="no_such_thing"):
        decoder_layers(model)[0].no_such_thing  # noqa: B018


def test_what_the_forward_raises_is_raised_where_it_goes_on(threads: int) -> None:
    model = make_model("llama", seed=0)
    put_slots(model)
    forward = SuspendedForward(lambda: body_forward(model, torch.tensor([[5, 6]])))
    embedded = forward.go_on()
    with pytest.raises(AttributeError, match="'str' object"):
        forward.go_on("not what an embedding gives")
    assert embedded.args[0].tolist() == [[5, 6]] and threading.active_count() == threads


def test_a_forward_that_is_abandoned_holds_nothing(threads: int) -> None:
    model = make_model("llama", seed=0)
    put_slots(model)
    unwound = []

    def run() -> Tensor:
        try:
            return body_forward(model, torch.tensor([[5, 6]]))
        finally:
            unwound.append(True)

    forward, never_begun = SuspendedForward(run), SuspendedForward(run)
    assert isinstance(forward.go_on(), Call) and threading.active_count() == threads + 1
    forward.abandon()
    never_begun.abandon()
    assert unwound == [True] and threading.active_count() == threads


def test_a_suspended_forward_makes_no_graph() -> None:
    model = make_model("bloom", seed=0)
    put_slots(model)
    with torch.no_grad():  # the caller's; the thread has its own
        (hidden,) = stream(model, [torch.tensor([[5, 6, 7]])])
    assert not hidden.requires_grad
