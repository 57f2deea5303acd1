"""The teacher: a ZeRO-3 engine without optimizer whose weights are streamed once per window.

Its layers may live in CPU memory or on NVMe. Every decoder layer becomes one unit of fetching;
while it is here it runs over *all* chunks of the window before the next layer comes:

    embed the window -> for each chunk: let the model prepare (masks, rotations); no layer runs yet
                     -> for each layer: fetch it, run it over every chunk, release it
                     -> for each chunk: let the model finish (final norm)

The model's own forward does the preparing and finishing, so any architecture of transformers works
unchanged. Shapes: E teacher width, N completion tokens of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.lengths import RowLengths
from gkd_ds.engine import accelerator, causal_lm, zero
from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.engine.counters import Counters
from gkd_ds.engine.startup_checks import refuse_both_sides, try_rows
from gkd_ds.learn.batching import length_groups
from gkd_ds.learn.head import TeacherHead
from gkd_ds.records import (
    Completions,
    Rollout,
    Sample,
    SequenceBatch,
    Source,
    TeacherTargets,
    sequence_batch,
)
from gkd_ds.rollout.decoding import decode
from gkd_ds.rollout.kv_cache import sequences_that_fit
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher import nvme

# One more chunk costs about as much as this many tokens: the weights are here already, only the
# calls are repeated.
CHUNK_OVERHEAD_TOKENS = 64


class StreamedTeacher:
    """Wraps `model` (whole, or partitioned by `zero.load`). Raises InputError for architectures it
    cannot stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GKDConfig,
        ds_config: dict[str, Any],
        vocabulary: int,
        pad_id: int,
        counters: Counters,
    ):
        self.model, self.config, self.vocabulary, self.counters = (
            model,
            config,
            vocabulary,
            counters,
        )
        self.pad_id, self.device = pad_id, accelerator.device()
        model.eval().requires_grad_(False)
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        layers = causal_lm.decoder_layers(model)
        following = [*layers[1:], nn.Module()]
        self.slots = [_LayerSlot(*neighbours, counters) for neighbours in zip(layers, following)]
        for index, slot in enumerate(self.slots):
            layers[index] = slot
        streamed = nn.ModuleList(slot.streamed for slot in self.slots)
        deepspeed.utils.set_z3_leaf_modules(streamed, [_StreamedLayer])
        self._keep_glue_whole(streamed)
        root = zero.EngineRoot(embedding=self.embedding, layers=streamed, head=self.head)
        self.engine = zero.initialize(root, ds_config)
        self.engine.eval()
        self._check()
        self.swap_files = nvme.SwapFiles(model)
        # Rows up to this length and longer ones must not share a batch; None: all of them may.
        self.switch: int | None = None

    def _keep_glue_whole(self, streamed: nn.ModuleList) -> None:
        """Norms, position tables and the like stay whole on every rank: small, and used once per
        chunk.

        They are left out of the engine's root, so ZeRO-3 neither fetches nor releases them.
        """
        managed = {
            id(p) for module in (streamed, self.embedding, self.head) for p in module.parameters()
        }
        glue = [p for p in self.model.parameters() if id(p) not in managed]
        zero.keep_whole(glue)
        for parameter in glue:
            parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    # -- score -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, rollouts: list[Rollout], heartbeat: Callable[[], None] = lambda: None
    ) -> TeacherTargets:
        """The teacher's last hidden states at the completion positions of `rollouts`, in their
        order.

        One pass over the weights, or as few as `targets_memory_mb` allows for the hidden states of
        a whole window: the same number on every rank. `heartbeat` is called after every layer.
        Collective, also for a rank that has no rollouts.
        """
        with self.swap_files.in_use():
            return self._score(rollouts, heartbeat)

    def _score(self, rollouts: list[Rollout], heartbeat: Callable[[], None]) -> TeacherTargets:
        passes = self._passes([len(rollout) for rollout in rollouts])
        (count,) = ranks.all_reduce_max([len(passes)])
        hidden: list[Tensor | None] = [None] * len(rollouts)
        for number in range(count):
            chunks = passes[number] if number < len(passes) else []
            batches = [
                sequence_batch([rollouts[i] for i in chunk], self.pad_id, self.device)
                for chunk in chunks
            ]
            hidden_of_chunk = self._pass(
                batches or [sequence_batch([], self.pad_id, self.device)], heartbeat
            )
            for chunk, hidden_NE in zip(chunks, hidden_of_chunk):
                lengths = [len(rollouts[i].completion_ids) for i in chunk]
                for index, part in zip(chunk, hidden_NE.split(lengths)):
                    hidden[index] = part
        return self._targets(rollouts, hidden)

    def _passes(self, lengths: list[int]) -> list[list[list[int]]]:
        """Cut a window into chunks (they bound activations), and chunks into passes (they bound
        hidden states).
        """
        text = self.model.config.get_text_config()
        per_token = text.hidden_size * self.head.weight.dtype.itemsize
        widest = max(4 * text.hidden_size, getattr(text, "intermediate_size", None) or 0)
        chunk_tokens = max(
            1, self.config.score_memory_mb * 2**20 // (4 * widest * self.head.weight.dtype.itemsize)
        )
        pass_tokens = max(1, self.config.targets_memory_mb * 2**20 // per_token)
        passes: list[list[list[int]]] = []
        room = 0
        for chunk in length_groups(
            lengths, min(chunk_tokens, pass_tokens), CHUNK_OVERHEAD_TOKENS, self.switch
        ):
            tokens = len(chunk) * lengths[chunk[0]]
            if tokens > room:
                passes.append([])
                room = max(pass_tokens, tokens)
            passes[-1].append(chunk)
            room -= tokens
        return passes

    def _pass(self, batches: list[SequenceBatch], heartbeat: Callable[[], None]) -> list[Tensor]:
        self.counters.teacher_passes += 1
        self.counters.teacher_bytes += _bytes([self.embedding.weight])
        return zero.run_pass(self.engine, lambda: self._stream(batches, heartbeat))

    def _stream(
        self, batches: list[SequenceBatch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """One pass over the layers for all batches; per batch the hidden states at its completion
        positions.
        """
        sizes = [batch.input_ids_BT.numel() for batch in batches]
        embedded_1SE = self.embedding(
            torch.cat([batch.input_ids_BT.flatten() for batch in batches])[None]
        )
        chunks = [
            _Chunk(embeds_SE.view(*batch.input_ids_BT.shape, -1))
            for batch, embeds_SE in zip(batches, embedded_1SE[0].split(sizes))
        ]
        for chunk, batch in zip(chunks, batches):
            with self._doors(chunk.note_call):
                causal_lm.body_forward(self.model, inputs_embeds=chunk.hidden_BTE, **batch.extra)
            chunk.hidden_BTE = chunk.calls[0].hidden  # what the first layer was given
        for index, slot in enumerate(self.slots):
            outputs = slot.streamed(
                calls=[chunk.calls[index].with_hidden(chunk.hidden_BTE) for chunk in chunks]
            )
            for chunk, output_BTE in zip(chunks, outputs):
                chunk.hidden_BTE = output_BTE
                chunk.calls[index] = None
            heartbeat()
        selected = []
        for chunk, batch in zip(chunks, batches):
            with self._doors(lambda slot, call, chunk=chunk: chunk.hidden_BTE):
                last_BTE = causal_lm.body_forward(
                    self.model, inputs_embeds=chunk.embeds_BTE, **batch.extra
                )
            selected.append(last_BTE.flatten(0, 1).index_select(0, batch.index_N))
        return selected

    @contextmanager
    def _doors(self, answer) -> Iterator[None]:
        """While open, a layer that the model calls does not run: `answer(slot index, call)` is its
        output.
        """
        for index, slot in enumerate(self.slots):
            slot.answer = lambda call, index=index: answer(index, call)
        try:
            yield
        finally:
            for slot in self.slots:
                slot.answer = None

    def _targets(self, rollouts: list[Rollout], hidden: list[Tensor]) -> TeacherTargets:
        offsets = [0]
        for rollout in rollouts:
            offsets.append(offsets[-1] + len(rollout.completion_ids))
        width = self.head.weight.shape[-1] if not hidden else hidden[0].shape[-1]
        if not hidden:
            return TeacherTargets(
                torch.zeros(0, width, dtype=self.head.weight.dtype, device=self.device), offsets
            )
        hidden_NE = torch.cat(hidden)
        if hidden_NE.numel() * hidden_NE.element_size() > self.config.targets_memory_mb * 2**20:
            hidden_NE = hidden_NE.cpu()
        return TeacherTargets(hidden_NE, offsets)

    # -- the head of the learn phase ---------------------------------------------------------------

    @contextmanager
    def whole_head(self) -> Iterator[TeacherHead]:
        """The output layer whole on every rank for one learn phase: one gather per window.
        Collective.
        """
        parameters = [p for p in (self.head.weight, self.head.bias) if p is not None]
        with zero.gathered(parameters):
            self.counters.teacher_bytes += _bytes(parameters)
            weight, bias = (
                None if p is None else p.data for p in (self.head.weight, self.head.bias)
            )
            yield TeacherHead(weight, bias, LogitTransform.of(self.model.config))

    # -- generate ----------------------------------------------------------------------------------

    def generate(
        self,
        samples: list[Sample],
        sampling: Sampling,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> Completions:
        """Complete prompts for sequence-level distillation. Every decode step is one pass over the
        weights.

        The teacher may be too large to gather, so its parameters stay where they are, and all ranks
        decode in step.
        """
        forward = causal_lm.decoding_forward(self.model, self.vocabulary)
        prompts = [sample.prompt_ids for sample in samples]
        sample_ids = [sample.sample_id for sample in samples]
        room = sequences_that_fit(self.model, samples, sampling, self.config)

        def stepwise(*args) -> Tensor:
            self.counters.teacher_decode_passes += 1
            return zero.run_pass(self.engine, lambda: forward(*args))

        with self.swap_files.in_use():
            return decode(
                stepwise,
                prompts,
                sample_ids,
                sampling,
                self.device,
                room,
                ranks.any_rank,
                heartbeat,
            )

    @torch.no_grad()
    def try_rows(self, lengths: RowLengths) -> None:
        """Try rows of these lengths beside each other, in one pass. Collective; raises InputError
        where a row's result would depend on others.
        """

        def run(batches: list[SequenceBatch]) -> list[Tensor]:
            return zero.run_pass(self.engine, lambda: self._stream(batches))

        with self.swap_files.in_use():
            self.switch = try_rows("teacher", self.model, run, lengths, "use another model")
        refuse_both_sides("teacher", Source.TEACHER, self.switch, lengths, "seq_kd to false")

    @torch.no_grad()
    def _check(self) -> None:
        """Streaming must give the hidden states of the model's own forward, and the head its
        logits.
        """
        probe = sequence_batch(
            [Rollout(0, Source.DATA, [1, 2, 3, 4], [5, 6, 7], True)], self.pad_id, self.device
        )
        zero.run_pass(self.engine, lambda: causal_lm.check_head(self.model, "teacher", self.device))
        zero.forget_order(self.engine)
        plain_BTE = zero.run_pass(
            self.engine, lambda: causal_lm.body_forward(self.model, probe.input_ids_BT)
        )
        plain_NE = plain_BTE.flatten(0, 1).index_select(0, probe.index_N)
        (streamed_NE,) = zero.run_pass(self.engine, lambda: self._stream([probe]))
        if (plain_NE - streamed_NE).abs().max() > 0.02 * plain_NE.abs().max().clamp(min=1.0):
            raise InputError(
                f"the teacher ({type(self.model).__name__}) does more between its decoder layers "
                "than gkd_ds can "
                "stream; use a plain decoder-only architecture."
            )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(zero.full_numel(p) * p.element_size() for p in parameters)


@dataclass(frozen=True)
class _Call:
    """How the model called one of its layers: everything but the hidden states is kept as it
    was.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: Tensor) -> _Call:
        return replace(self, hidden=hidden)


class _Chunk:
    """Some rollouts of the window on their way through the layers."""

    def __init__(self, embeds_BTE: Tensor):
        self.embeds_BTE = self.hidden_BTE = embeds_BTE
        self.calls: list[_Call | None] = []

    def note_call(self, index: int, call: _Call) -> Tensor:
        assert index == len(self.calls), "the model calls its decoder layers once each, in order"
        self.calls.append(call)
        return call.hidden


class _StreamedLayer(nn.Module):
    """One decoder layer over all chunks: the unit that ZeRO-3 fetches and releases (a leaf module
    to it).
    """

    def __init__(self, layer: nn.Module, following: nn.Module, counters: Counters):
        super().__init__()
        self.layer, self.counters = layer, counters
        self.ahead = list(following.parameters())

    def forward(self, *, calls: list[_Call]) -> list[Tensor]:
        self.counters.teacher_bytes += _bytes(self.layer.parameters())
        nvme.read_ahead(self.ahead)
        return [self.layer(call.hidden, *call.args, **call.kwargs) for call in calls]


class _LayerSlot(nn.Module):
    """Stands in the model's layer list: runs its layer, or gives the answer that streaming has put
    at its door.
    """

    def __init__(self, layer: nn.Module, following: nn.Module, counters: Counters):
        super().__init__()
        self.streamed = _StreamedLayer(layer, following, counters)
        self.answer = None

    def __getattr__(self, name: str):
        # The model may ask its layers for attributes such as `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("streamed").layer, name)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        call = _Call(hidden_states, args, kwargs)
        return self.answer(call) if self.answer else self.streamed(calls=[call])[0]
