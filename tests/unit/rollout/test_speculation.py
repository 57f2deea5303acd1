"""What comes of a draft is what the plain loop writes, whatever the draft is; and how much of it
was read instead of decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.learn.head import LossHead
from gkd_ds.records import Completions, Sample, Source
from gkd_ds.rollout import speculation
from gkd_ds.rollout.decoder import Decoder
from gkd_ds.rollout.sampling import Sampling
from tests.tiny import make_model
from tests.unit.rollout.reference import prompts

CPU = torch.device("cpu")
STOPS = tuple(range(20, 33))
SAMPLING = Sampling(40, 1.0, seed=1, stop_ids=STOPS, pad_id=0, vocabulary=384)
PROMPTS = prompts(16)
NOTHING: list[list[int]] = [[] for _ in PROMPTS]


class Writer:
    """A student as far as a rollout needs one, and how it decodes."""

    def __init__(self, family: str, tokenizer):
        self.model = make_model(family, seed=3, tokenizer=tokenizer)
        head = LossHead(self.model.get_output_embeddings(), LogitTransform.of(self.model.config))
        self.model.set_output_embeddings(head)
        self.decoder = Decoder(self.model, "student", "choose another", 384, CPU, None)
        self.student = SimpleNamespace(model=self.model, device=CPU, switch=None)

    def plain(self, sampling: Sampling = SAMPLING) -> list[list[int]]:
        """What the plain loop writes."""
        samples = [Sample(row, ids, [], Source.STUDENT) for row, ids in enumerate(PROMPTS)]
        return self.decoder.complete(samples, sampling, lambda: None).token_ids

    def before(self, sampling: Sampling) -> list[list[int]]:
        """What it wrote when its weights were others, by a few updates."""
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 5e-4 * torch.randn(parameter.shape, generator=generator)
        written = self.plain(sampling)
        self.model.load_state_dict(now)
        return written

    def from_drafts(
        self, drafts: list[list[int]], sampling: Sampling = SAMPLING, heartbeat: Callable = int
    ) -> Completions:
        samples = [
            Sample(row, prompt, [], Source.STUDENT, draft)
            for row, (prompt, draft) in enumerate(zip(PROMPTS, drafts))
        ]
        return speculation.complete(self.student, self.decoder, samples, sampling, heartbeat)


@pytest.fixture(scope="module")
def llama(tokenizer) -> Writer:
    return Writer("llama", tokenizer)


@pytest.fixture(scope="module")
def in_lockstep(tokenizer) -> Writer:
    return Writer("qwen3_next", tokenizer)


@pytest.fixture(scope="module", params=["padded", "in lockstep"])
def writer(request, llama: Writer, in_lockstep: Writer) -> Writer:
    found = llama if request.param == "padded" else in_lockstep
    assert found.decoder.way.name == request.param
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_the_plain_loop(writer: Writer, temperature: float) -> None:
    sampling = replace(SAMPLING, temperature=temperature)
    expected, drafts = writer.plain(sampling), writer.before(sampling)
    got = writer.from_drafts(drafts, sampling)
    assert got.token_ids == expected
    assert got.stopped == [ids[-1] in STOPS for ids in expected]
    assert len({len(ids) for ids in expected}) > 3, "the case is ragged"
    same = [ids == draft for ids, draft in zip(expected, drafts)]
    assert any(same) and not all(same), "drafts hold to the end, and do not"
    assert got.drafted_tokens == sum(map(len, drafts))
    assert 0.1 < got.accepted_tokens / got.drafted_tokens < 1
    plain = writer.from_drafts(NOTHING, sampling)
    assert plain.token_ids == expected and plain.drafted_tokens == plain.accepted_tokens == 0
    assert got.decoded_sequences < plain.decoded_sequences


def test_logits_are_the_model_s_own_where_they_are_capped(tokenizer) -> None:
    writer = Writer("gemma2", tokenizer)
    expected = writer.plain()
    assert writer.from_drafts(expected).token_ids == expected
    assert writer.from_drafts(writer.before(SAMPLING)).token_ids == expected


def test_any_draft_will_do(writer: Writer) -> None:
    expected = writer.plain()
    kinds = {
        "another row's": lambda row: expected[row - 1],
        "cut": lambda row: expected[row][: len(expected[row]) // 2],
        "behind a stop token": lambda row: [STOPS[0], *expected[row]],
        "with a stop token inside": lambda row: [*expected[row][:1], STOPS[0], 7, 7],
        "none": lambda row: [],
        "its own": lambda row: expected[row],
        "with something behind its end": lambda row: [*expected[row], 5, 5, 5],
    }
    makers = list(kinds.values())
    drafts = [makers[row % len(makers)](row) for row in range(len(PROMPTS))]
    assert writer.from_drafts(drafts).token_ids == expected


def test_a_draft_that_holds_is_not_decoded(llama: Writer) -> None:
    expected = llama.plain()
    got = llama.from_drafts(expected)
    assert got.token_ids == expected
    assert got.decoded_sequences == got.prefilled_tokens == 0
    assert got.accepted_tokens == got.drafted_tokens == sum(map(len, expected))


@pytest.mark.parametrize("then, now", [(40, 12), (12, 40)])
@pytest.mark.parametrize("max_length", [None, 35])
def test_limits_may_be_others_than_the_draft_s(writer: Writer, then, now, max_length) -> None:
    """They shrink, or grow: then a draft that was cut goes on."""
    at = lambda limit: replace(SAMPLING, max_new_tokens=limit, max_length=max_length)  # noqa: E731
    expected = writer.plain(at(now))
    got = writer.from_drafts(writer.plain(at(then)), at(now))
    assert got.token_ids == expected
    assert got.stopped == [ids[-1] in STOPS for ids in expected]


def test_what_is_computed_at_a_time_is_bounded(llama: Writer, monkeypatch) -> None:
    """Sequences of a forward, and logits of a chunk."""
    expected = llama.plain()
    monkeypatch.setattr(speculation, "LOGITS_BYTES", 4 * 384 * 7)
    monkeypatch.setattr(speculation, "PREFILL_TOKENS", 100)
    inputs, chunks, beats = [], [], []
    embedding, head = llama.model.get_input_embeddings(), llama.model.get_output_embeddings()
    hooks = [
        embedding.register_forward_hook(lambda _, args, out: inputs.append(args[0].shape)),
        head.register_forward_hook(lambda _, args, out: chunks.append(len(out))),
    ]
    assert llama.from_drafts(expected, heartbeat=lambda: beats.append(1)).token_ids == expected
    for hook in hooks:
        hook.remove()
    assert max(chunks) == 7 and sum(chunks) == sum(map(len, expected))
    assert len(inputs) > 2 and all(B == 1 or B * T <= 100 for B, T in inputs)
    assert len(beats) >= len(inputs)
