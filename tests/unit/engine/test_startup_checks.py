"""A row comes out the same each time and beside others, or the model is refused: architectures with
each fault, and those without.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gkd_ds.data.lengths import RowLengths, Span
from gkd_ds.engine import causal_lm
from gkd_ds.engine.startup_checks import (
    refuse_both_sides,
    require_gradients,
    require_same_order,
    try_rows,
)
from gkd_ds.records import SequenceBatch, Source
from gkd_ds.runtime.errors import InputError
from tests.architectures import make_model

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2}
WIDTHS |= {"num_attention_heads": 4, "n_head": 4, "n_embd": 32, "d_model": 32, "n_heads": 4}
WIDTHS |= {"num_key_value_heads": 4, "vocab_size": 300, "rotary_dim": 4}
WIDTHS |= {"num_local_experts": 4, "num_experts": 4, "head_dim": 8, "word_embed_proj_dim": 32}
WIDTHS |= {"num_experts_per_tok": 2, "max_position_embeddings": 160, "n_positions": 160}
WIDTHS |= {"original_max_position_embeddings": 40}  # Phi-3 has it beside the rotations
WIDTHS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 40, "factor": 4.0, "rope_theta": 1e4}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.2}  # PhiMoE's
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def make(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Tiny, with those of WIDTHS that its configuration knows, and with `fields`."""
    known = CONFIG_MAPPING[kind].__dataclass_fields__
    widths = {name: size for name, size in WIDTHS.items() if name in known}
    config = AutoConfig.for_model(kind, **(widths | copy.deepcopy(fields)))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def trial(model: PreTrainedModel, longest: int, shortest: int = 9, dropout: bool = False):
    """What the student does, without an engine."""

    @torch.no_grad()
    def run(batches: list[SequenceBatch]) -> list[Tensor]:
        hidden = []
        for batch in batches:
            causal_lm.set_learning_mode(model, dropout) if hidden else model.eval()
            every_BTD = causal_lm.body_forward(model, batch.input_ids_BT, **batch.extra)
            hidden.append(every_BTD.flatten(0, 1)[batch.index_N])
        return hidden

    lengths = RowLengths((Span(Source.DATA, shortest, longest),))
    with causal_lm.without_dropout(model):
        return try_rows("student", model, run, lengths, "do this")


# -- right ones ----------------------------------------------------------------------------------

SOUND: dict[str, tuple[str, dict]] = {kind: (kind, {}) for kind in [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "gpt_neox", "gptj",
    "codegen", "phi3", "bloom", "falcon", "mamba", "mixtral", "qwen3_moe", "xglm", "biogpt",
]}  # fmt: skip
SOUND |= {
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "yarn": ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "alibi": ("falcon", {"alibi": True}),
    "mpt": ("mpt", {"max_seq_len": 160}),
    "router jitter": ("mixtral", {"router_jitter_noise": 0.1}),
    "random experts": ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SOUND)
def test_a_row_is_the_same_whatever_is_beside_it(name: str, dtype: torch.dtype) -> None:
    kind, fields = SOUND[name]
    assert trial(make(kind, dtype, **fields), 160) is None


def test_the_check_does_not_look_beyond_the_run_s_longest_row() -> None:
    assert trial(make("phi3", rope_parameters=LONGROPE), 40) is None
    assert trial(make("llama", rope_parameters=DYNAMIC), 160) is None
    assert trial(make("mpt", max_seq_len=64), 64) is None


# -- rows that depend on the longest -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen3", "phimoe", "mixtral"])
@pytest.mark.parametrize("longest, shortest", [(41, 9), (160, 9), (160, 40), (160, 70)])
def test_the_length_at_which_tables_switch_is_found(
    kind: str, longest: int, shortest: int, dtype: torch.dtype
) -> None:
    model = make(kind, dtype, rope_parameters=LONGROPE | (MSCALES if kind == "phimoe" else {}))
    assert trial(model, longest, shortest) == 40


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "gemma"])
def test_tables_that_follow_the_longest_row_are_refused_with_their_length(kind: str) -> None:
    model = make(kind, rope_parameters=DYNAMIC, max_position_embeddings=64)
    assert trial(model, 64) is None
    for longest in (65, 66, 200):
        with pytest.raises(InputError, match="more than 64 tokens; set max_length to 64 or less"):
            trial(model, longest)


def test_sides_are_refused_where_rows_are_written_across_them() -> None:
    student, data = Span(Source.STUDENT, 9, 60), Span(Source.DATA, 9, 60)
    refuse_both_sides("student", Source.STUDENT, None, RowLengths((student,)), "this")
    refuse_both_sides("student", Source.STUDENT, 60, RowLengths((student,)), "this")
    refuse_both_sides("student", Source.STUDENT, 8, RowLengths((student,)), "this")
    refuse_both_sides("student", Source.STUDENT, 40, RowLengths((data,)), "this")
    with pytest.raises(InputError, match="more than 40 tokens .* rows of 9 to 60 .* or this"):
        refuse_both_sides("student", Source.STUDENT, 40, RowLengths((data, student)), "this")


TABLES: dict[str, dict] = {
    "gptj": {"n_positions": 64},
    "codegen": {"n_positions": 64},
    "ctrl": {"n_positions": 64, "dff": 64},
    "mpt": {"max_seq_len": 64},
    "whisper": {"max_target_positions": 64, "decoder_layers": 2, "decoder_attention_heads": 4},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_that_is_too_long_for_the_model_is_refused(kind: str) -> None:
    model = make(kind, **TABLES[kind])
    assert trial(model, 64) is None
    with pytest.raises(InputError, match="cannot compute a row of 65 tokens .*max_length"):
        trial(model, 65)


# -- rows that depend on their neighbours --------------------------------------------------------


def test_tokens_that_compete_with_their_neighbours_are_refused() -> None:
    """An expert with room for a few tokens takes the first that come, as with a capacity factor."""
    model = make("llama")

    def full(module, args, output: Tensor) -> Tensor:
        flat = output.flatten(0, -2)
        return torch.cat([flat[:40], torch.zeros_like(flat[40:])]).view_as(output)

    model.model.layers[1].mlp.register_forward_hook(full)
    with pytest.raises(InputError, match="student .LlamaForCausalLM. computes a row differently"):
        trial(model, 100)


def test_tokens_that_see_what_comes_after_them_are_refused() -> None:
    model = make("llama")
    model.model.layers[0].register_forward_hook(
        lambda _, args, output: output + output.mean(1, True)
    )
    with pytest.raises(InputError, match="the student .LlamaForCausalLM. computes"):
        trial(model, 100)


def test_a_choice_between_equal_tokens_that_falls_otherwise_beside_others_is_refused() -> None:
    """Doge attends to the best positions by a score that knows no positions: a word that stands in
    a row twice is as good in either place, and which of both is taken depends on the padding.
    """
    assert trial(make("doge", keep_window_size=160), 100) is None
    with pytest.raises(InputError, match="student .DogeForCausalLM. computes a row differently"):
        trial(make("doge", keep_window_size=8), 100)


# -- parts that do not run for every row ---------------------------------------------------------


def order(model: PreTrainedModel) -> None:
    with torch.no_grad():
        require_same_order(model.eval(), lambda run: run())


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "qwen3_moe", "phimoe", "mamba", "bloom", "jamba", "falcon_h1"]
)
def test_parts_that_run_for_every_row_are_no_problem(kind: str) -> None:
    order(make_model(kind, 0))


@pytest.mark.parametrize("kind, parts", [
    ("dbrx", "DbrxExperts"), ("longcat_flash", "LongcatFlashExperts"),
    ("qwen4_exp_text", "Qwen4ExpTextQSAIndexer"),
])  # fmt: skip
def test_parts_that_run_by_the_tokens_are_refused_until_they_are_fetched_together(
    kind: str, parts: str
) -> None:
    model = make_model(kind, 0)
    with pytest.raises(InputError, match=f'"leaf_module": {{"classes": ."{parts}".}} to zero_opt'):
        order(model)
    set_z3_leaf_modules(model, [parts])
    order(model)


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "mamba", "qwen3_next", "git"])
def test_a_student_is_gone_through_backwards_and_no_weight_gets_a_gradient(
    kind: str, checkpointing: dict | None
) -> None:
    model = make_model(kind, 0)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    causal_lm.set_learning_mode(model, dropout=False)
    require_gradients(model, lambda run: run())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_student_that_cannot_be_gone_through_backwards_is_refused() -> None:
    """Reformer's backward asks for training mode, in which its attention is random."""
    with pytest.raises(InputError, match="the student .Reformer.* cannot learn .AssertionError"):
        require_gradients(make_model("reformer", 0), lambda run: run())
    model = make("llama")
    model.model.layers[0].register_forward_hook(lambda _, args, output: output.detach())
    with pytest.raises(InputError, match="no gradient comes back to its embedding"):
        require_gradients(model, lambda run: run())
    model = make("llama")
    model.model.forward = torch.no_grad()(model.model.forward)
    with pytest.raises(InputError, match="no gradient comes back to its embedding"):
        require_gradients(model, lambda run: run())


# -- noise ---------------------------------------------------------------------------------------

NOISY = {
    "mixtral": {"router_jitter_noise": 0.1},
    "minimax_m2": {"router_jitter_noise": 0.1},
    "phimoe": {},  # draws its experts in training mode, also without jitter
}


@pytest.mark.parametrize("kind", NOISY)
def test_noise_of_training_mode_is_refused_by_its_place(kind: str) -> None:
    """Where dropout is wanted, training mode is on everywhere."""
    model = make(kind, **NOISY[kind])
    where = r"random numbers in model\.layers\.0\.\S+, for something else than dropout .* do this"
    with pytest.raises(InputError, match=where):
        trial(model, 40, dropout=True)


@pytest.mark.parametrize("kind", NOISY)
def test_without_dropout_noise_is_off_and_checkpointed_gradients_are_those_of_evaluation(
    kind: str,
) -> None:
    model = make(kind, **NOISY[kind]).eval()
    ids_BT = torch.arange(3, 43).remainder(300).view(2, 20)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        causal_lm.body_forward(model, ids_BT).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    causal_lm.set_learning_mode(model, dropout=False)
    assert any(module.training for module in model.modules()), "checkpointing is on"
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},  # read from the configuration
    "llama": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_no_noise_and_is_still_there_after_the_check(kind: str) -> None:
    model = make(kind, **DROPOUT[kind])
    assert trial(model, 40, dropout=True) is None
    ids_BT = torch.arange(3, 43)[None]
    with torch.no_grad():
        one, other = causal_lm.body_forward(model, ids_BT), causal_lm.body_forward(model, ids_BT)
    assert (one - other).abs().max() > 1e-3


def test_dropout_that_cannot_be_switched_off_is_noise() -> None:
    """Falcon's layers read their rates from the configuration; a layer that checkpoints is in
    training mode.
    """
    model = make("falcon", **DROPOUT["falcon"])
    causal_lm.disable_dropout(model)
    model.gradient_checkpointing_enable()
    ids_BT = torch.arange(3, 43)[None]
    causal_lm.set_learning_mode(model, dropout=False)
    with torch.no_grad():
        one, other = causal_lm.body_forward(model, ids_BT), causal_lm.body_forward(model, ids_BT)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("own_generator", [False, True])
def test_noise_that_is_always_on_is_refused(own_generator: bool) -> None:
    model = make("qwen2")
    generator = torch.Generator().manual_seed(1) if own_generator else None
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _, args, output: output + 0.01 * torch.randn(output.shape, generator=generator)
    )
    with pytest.raises(InputError, match=r"random numbers in model\.layers\.1\.mlp"):
        trial(model, 40)


def test_noise_that_happened_to_change_nothing_is_refused() -> None:
    """A layer that is skipped once in a million forwards."""
    model = make("qwen2")
    model.model.layers[1].register_forward_hook(
        lambda _, args, output: output if torch.rand(()) > 1e-6 else args[0]
    )
    with pytest.raises(InputError, match=r"random numbers in model\.layers\.1,"):
        trial(model, 40)


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand])
def test_noise_that_is_not_torch_s_is_refused(draw) -> None:
    model = make("qwen2")
    model.model.layers[1].register_forward_hook(
        lambda _, args, output: output if draw() > 1e-9 else args[0]
    )
    with pytest.raises(InputError, match=r"random numbers in model\.layers\.1,"):
        trial(model, 40)


def test_a_model_that_learns_another_function_than_it_samples_is_refused() -> None:
    model = make("qwen2")
    model.model.norm.register_forward_hook(
        lambda module, args, output: output * (1.5 if module.training else 1)
    )
    assert trial(model, 40) is None, "without dropout it learns what it samples"
    with pytest.raises(InputError, match="something else where it learns than where it samples"):
        trial(model, 40, dropout=True)
