"""The decode loop: what is drawn, when a row ends, and that a sample's tokens do not depend on its
neighbours.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gkd_ds.engine import accelerator
from gkd_ds.engine.causal_lm import decoding_forward
from gkd_ds.learn.head import LossHead
from gkd_ds.records import Completions
from gkd_ds.rollout.decoding import SYNC_EVERY, decode
from gkd_ds.rollout.sampling import Sampling, draw, uniforms
from tests.tiny import make_model
from tests.unit.rollout.reference import one_by_one, prompts

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- drawing


def test_uniforms_depend_on_seed_sample_and_position_alone() -> None:
    whole = uniforms(3, [5, 9, 1 << 40], 50)
    assert torch.equal(uniforms(3, [9], 50)[0], whole[1])
    assert torch.equal(uniforms(3, [1 << 40, 5], 50), whole[[2, 0]])
    assert torch.equal(uniforms(3, [5], 20)[0], whole[0, :20])
    assert not torch.equal(uniforms(4, [5], 50)[0], whole[0])
    assert uniforms(3, [], 7).shape == (0, 7)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(0, list(range(2000)), 100).double()
    assert ((u >= 0) & (u < 1)).all()
    assert u.unique().numel() > 0.98 * u.numel()
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 120  # chi-squared, 63 degrees of freedom: p < 1e-5
    centred = u - 0.5
    for one, other in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((one * other).mean() * 12) < 0.01, (
            "neighbouring samples and positions are independent"
        )
    seeds = torch.stack([uniforms(seed, [0], 1)[0, 0] for seed in range(2000)])
    assert abs(seeds.mean() - 0.5) < 0.03


def inverse_cdf(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The interval of the float64 cumulated softmax that each drawn token should cover."""
    end_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    token_B = torch.searchsorted(end_BV, uniform_B.double()[:, None], right=True)[:, 0]
    return token_B, end_BV, end_BV - (logits_BV.double() / temperature).softmax(-1)


@settings(deadline=None, max_examples=80)
@given(
    vocabulary=st.integers(1, 1500),
    temperature=st.floats(0.1, 3.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 2**31),
)
def test_a_draw_is_the_inverse_cdf_of_the_softmax(vocabulary, temperature, scale, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(32, vocabulary, generator=generator)
    uniform = torch.rand(32, generator=generator)
    token = draw(logits, uniform, temperature)
    expected, end, start = inverse_cdf(logits, uniform, temperature)
    # fp32 weights move the borders between tokens by a few 1e-7: next to a border either token will
    # do.
    rows = torch.arange(32)
    slack = 2e-6 * (1 + scale / temperature)
    assert (start[rows, token] - slack <= uniform).all() and (
        uniform <= end[rows, token] + slack
    ).all()
    assert (token == expected).float().mean() > 0.9


def test_edges_of_the_unit_interval_and_ruled_out_tokens() -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[:, [256, 511, 600]] = (
        0.0  # the first of a block, the last of a block, one of the ragged last block
    )
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert draw(logits, uniform, 1.0).tolist() == [256, 511, 600]
    one_certain = torch.full((2, 300), -torch.inf)
    one_certain[:, 7] = 3.0
    assert draw(one_certain, torch.tensor([0.0, 1 - 2**-24]), 0.5).tolist() == [7, 7]


def test_a_row_s_draw_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = (
        4 * torch.randn(64, 999, generator=generator),
        torch.rand(64, generator=generator),
    )
    together = draw(logits, uniform, 0.8)
    assert together.tolist() == [int(draw(logits[[row]], uniform[[row]], 0.8)) for row in range(64)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    uniform = uniforms(11, list(range(200)), 200).flatten()
    count = torch.bincount(
        draw(logits.expand(len(uniform), -1), uniform, temperature), minlength=40
    )
    expected = (logits.double() / temperature).softmax(-1) * len(uniform)
    common = expected > 5
    statistic = ((count - expected) ** 2 / expected)[common].sum()
    assert statistic < 95, "chi-squared, at most 39 degrees of freedom: p < 1e-6"


def test_logits_are_left_as_they_are() -> None:
    for vocabulary in (300, 512):
        logits = torch.randn(2, vocabulary)
        before = logits.clone()
        draw(logits, torch.rand(2), 0.7)
        assert torch.equal(logits, before)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draw(logits, torch.rand(9), 0.0), logits.argmax(-1))


# ---------------------------------------------------------------------------------------- decoding


# A random model seldom writes one particular token: with these it stops after thirty tokens on
# average.
STOPS = tuple(range(20, 33))
SAMPLING = Sampling(
    max_new_tokens=60, temperature=1.0, seed=1, stop_ids=STOPS, pad_id=0, vocabulary=384
)


def run(model, prompts, sampling=SAMPLING, sample_ids=None, max_sequences=None) -> Completions:
    ids = list(range(len(prompts))) if sample_ids is None else sample_ids
    return decode(
        decoding_forward(model, sampling.vocabulary), prompts, ids, sampling, CPU, max_sequences
    )


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    lengths = (tokens := one_by_one(model, prompts(24), SAMPLING)) and [len(t) for t in tokens]
    assert max(lengths) == 60 and min(lengths) <= 3 and len(set(lengths)) > 10, "the case is ragged"
    return tokens


@pytest.mark.parametrize(
    "batch, max_rows", [(1, None), (3, None), (8, None), (8, 3), (24, None), (24, 5)]
)
def test_tokens_are_the_same_in_any_batch(
    model, expected, batch: int, max_rows: int | None
) -> None:
    given = prompts(24)
    for first in range(0, 24, batch):
        rows = list(range(first, first + batch))
        assert run(
            model, [given[i] for i in rows], sample_ids=rows, max_sequences=max_rows
        ).token_ids == [expected[i] for i in rows]


def test_order_does_not_matter(model, expected) -> None:
    given, order = (
        prompts(24),
        torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist(),
    )
    got = run(model, [given[i] for i in order], sample_ids=order, max_sequences=7)
    assert got.token_ids == [expected[i] for i in order]


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "gpt_neox", "phi3", "qwen3"])
def test_other_families_too(family: str, tokenizer) -> None:
    """Learned positions (GPT-2, OPT), rotary ones, and a sliding window (Gemma 2) that the
    sequences outgrow.
    """
    model = make_model(family, tokenizer=tokenizer, seed=5)
    given, sampling = prompts(4, seed=2), replace(SAMPLING, max_new_tokens=70)
    assert run(model, given, sampling, max_sequences=2).token_ids == one_by_one(
        model, given, sampling
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_weights_in_another_layout_write_the_same_tokens(family: str, tokenizer) -> None:
    """Layers with and without a bias, and a head that is large enough to be packed for oneDNN."""
    model = make_model(family, tokenizer=tokenizer, hidden=256, vocab_size=4096, init_range=0.1)
    head = model.get_output_embeddings()
    assert head.weight.numel() >= accelerator._ONEDNN_WEIGHTS
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert any(layer.bias is not None for layer in linear) == (family == "gpt_neox")
    given = prompts(8)
    plain = run(model, given).token_ids
    with accelerator.fast_decoding(model, linear=(nn.Linear, LossHead)):
        assert all("forward" in layer.__dict__ for layer in linear)
        assert run(model, given).token_ids == plain
    assert not any("forward" in layer.__dict__ for layer in linear)


def test_a_finished_row_does_not_outgrow_the_model_s_positions(tokenizer) -> None:
    """It is computed until it is dropped; GPT-2 has a table of 512 positions and no more."""
    model = make_model("gpt2", tokenizer=tokenizer)
    given = [[5] * 505, [6] * 500]
    got = run(model, given, replace(SAMPLING, stop_ids=(), max_length=512, max_new_tokens=512))
    assert [len(tokens) for tokens in got.token_ids] == [7, 12]


def test_a_model_that_changed_itself_while_decoding_can_be_trained(tokenizer) -> None:
    """Rotary tables that grow with the length are made in inference mode, whose tensors autograd
    refuses.
    """
    model = make_model("llama", tokenizer=tokenizer)
    model.config.max_position_embeddings = 16
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = type(model)(model.config)
    before = model.model.rotary_emb.inv_freq.clone()
    with accelerator.fast_decoding(model, linear=(nn.Linear, LossHead)):
        run(model, prompts(4))
    assert not before.equal(model.model.rotary_emb.inv_freq), "the sequences outgrew the table"
    assert not any(buffer.is_inference() for buffer in model.buffers())
    ids = torch.arange(1, 40)[None]
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("max_rows", [None, 3])
def test_greedy_decoding_is_transformers_generate(model, max_rows: int | None) -> None:
    given, sampling = prompts(9), replace(SAMPLING, temperature=0.0)
    width = max(len(prompt) for prompt in given)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in given])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given])
    with torch.no_grad():
        theirs = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=60,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
    got = run(model, given, sampling, max_sequences=max_rows)
    assert any(got.stopped) and not all(got.stopped)
    for tokens, row in zip(got.token_ids, theirs[:, width:].tolist(), strict=True):
        assert tokens == row[: len(tokens)]
        assert all(token == 0 for token in row[len(tokens) :])


def test_a_completion_ends_with_its_stop_token_or_at_its_limit(model) -> None:
    got = run(model, prompts(24), max_sequences=5)
    for tokens, stopped in zip(got.token_ids, got.stopped, strict=True):
        assert not any(token in STOPS for token in tokens[:-1])
        assert stopped == (tokens[-1] in STOPS)
        assert stopped or len(tokens) == 60


def test_a_stop_token_at_the_limit_counts_as_stopped(model, expected) -> None:
    row = next(row for row, tokens in enumerate(expected) if 2 <= len(tokens) < 60)
    length, given = len(expected[row]), prompts(24)[row]
    at_limit = run(model, [given], replace(SAMPLING, max_new_tokens=length), sample_ids=[row])
    before = run(model, [given], replace(SAMPLING, max_new_tokens=length - 1), sample_ids=[row])
    assert at_limit.token_ids == [expected[row]] and at_limit.stopped == [True]
    assert before.token_ids == [expected[row][:-1]] and before.stopped == [False]


def test_stop_at_once(model) -> None:
    everything = replace(SAMPLING, stop_ids=tuple(range(384)))
    got = run(model, prompts(6), everything, max_sequences=2)
    assert [len(tokens) for tokens in got.token_ids] == [1] * 6 and all(got.stopped)


def test_max_length_limits_prompt_and_completion_together(model) -> None:
    given = prompts(12)
    sampling = replace(SAMPLING, stop_ids=(), max_length=40)
    got = run(model, given, sampling, max_sequences=4)
    assert [len(prompt) + len(tokens) for prompt, tokens in zip(given, got.token_ids)] == [40] * 12
    assert not any(got.stopped)
    unlimited = run(model, given, replace(SAMPLING, stop_ids=()))
    assert all(a == b[: len(a)] for a, b in zip(got.token_ids, unlimited.token_ids))


def test_pad_may_equal_the_stop_token(model, expected) -> None:
    """Padding is known by position: neither prompts that hold the pad token nor its use as a stop
    change anything.
    """
    pad = next(tokens[-1] for tokens in expected[:8] if tokens[-1] in STOPS)
    given = [[*prompt[:1], pad, *prompt[1:]] for prompt in prompts(8)]
    same = replace(SAMPLING, pad_id=pad)
    assert run(model, given, same, max_sequences=3).token_ids == one_by_one(model, given, SAMPLING)
    assert run(model, prompts(24)[:8], same, max_sequences=3).token_ids == expected[:8]


def test_tokens_beyond_the_shared_vocabulary_are_never_drawn(tokenizer) -> None:
    model = make_model("llama", tokenizer=tokenizer, vocab_size=1024, seed=6)
    narrow = replace(SAMPLING, temperature=3.0)
    assert max(max(tokens) for tokens in run(model, prompts(8), narrow).token_ids) < 384
    wide = replace(narrow, vocabulary=1024)
    assert max(max(tokens) for tokens in run(model, prompts(8), wide).token_ids) >= 384


def test_work_follows_the_number_of_real_tokens(model) -> None:
    given = prompts(48, seed=7)
    got = run(model, given, replace(SAMPLING, max_new_tokens=200, stop_ids=tuple(range(20, 26))))
    lengths = [len(tokens) for tokens in got.token_ids]
    assert max(lengths) > 2.5 * sum(lengths) / len(lengths) > 120, (
        "ragged: decoding in step would cost 2.5 times"
    )
    # The first token of each completion comes out of its prompt's forward.
    assert got.decoded_sequences <= 1.15 * sum(lengths)
    assert got.prefilled_tokens <= 48 * max(len(prompt) for prompt in given)


def test_nothing_to_do(model) -> None:
    assert run(model, []) == Completions([], [], 0, 0)


def test_a_rank_without_rows_keeps_step_with_the_others(model) -> None:
    """Partitioned parameters: as long as any rank decodes, all call the model equally often."""
    calls = []

    def counted(ids, mask, positions, cache):
        calls.append(ids.shape[0])
        return decoding_forward(model, 384)(ids, mask, positions, cache)

    answers = iter([True, True, True, False, False])  # two turns, a refill in the first
    got = decode(counted, [], [], SAMPLING, CPU, agree=lambda here: next(answers))
    assert got.token_ids == [] and got.decoded_sequences == 0
    assert calls == [1] * (1 + 4 + 4)


def test_a_long_rollout_says_often_that_it_is_alive(model) -> None:
    beats = []
    sampling = replace(SAMPLING, max_new_tokens=40, stop_ids=())
    forward = decoding_forward(model, sampling.vocabulary)
    decode(forward, prompts(2), [0, 1], sampling, CPU, heartbeat=lambda: beats.append(1))
    assert len(beats) >= 40 // SYNC_EVERY
