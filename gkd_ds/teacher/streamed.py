"""The teacher: a ZeRO-3 engine without optimizer whose weights are streamed once per window.

Its layers may live in CPU memory or on NVMe. Every decoder layer becomes one unit of fetching;
while it is here it runs over *all* chunks of the window before the next layer comes:

    for each chunk: run the model's own forward up to its first layer
    for each layer: fetch it, run it over every chunk, release it
                    for each chunk: go on with the model's own forward up to the next layer, or to
                    the end

The model's own forward (suspended.py) does all but the layers, so any architecture of transformers
works unchanged. Shapes: E teacher width, N completion tokens of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
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
from gkd_ds.engine.lending import Loan, guard
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
from gkd_ds.rollout.decoder import Decoder
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher import nvme
from gkd_ds.teacher.chunks import TargetsInOrder, tokens_per_chunk
from gkd_ds.teacher.suspended import Call, Slot, SuspendedForward

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
        self._loan = Loan(model)
        guard(model)
        model.eval().requires_grad_(False)
        self.head = model.get_output_embeddings()
        embedding, layers = model.get_input_embeddings(), causal_lm.decoder_layers(model)
        self.embedding = _Streamed(embedding, nn.Module(), counters)
        following = [*layers[1:], nn.Module()]
        streamed = nn.ModuleList(_Streamed(*pair, counters) for pair in zip(layers, following))
        model.set_input_embeddings(Slot(self.embedding))
        for index, layer in enumerate(streamed):
            layers[index] = Slot(layer)
        self._keep_glue_whole(streamed)
        root = zero.EngineRoot(embedding=self.embedding, layers=streamed, head=self.head)
        deepspeed.utils.set_z3_leaf_modules(root, [_Streamed])
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

    def release(self) -> None:
        """End the engine: `model` is a model again. One process only."""
        self._loan.end(self.engine)
        del self.engine

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
        scored = TargetsInOrder(rollouts, self.head.weight)
        for chunks in passes + [[[]]] * (count - len(passes)):
            batches = [
                sequence_batch([rollouts[i] for i in chunk], self.pad_id, self.device)
                for chunk in chunks
            ]
            for chunk, hidden_NE in zip(chunks, self._pass(batches, heartbeat)):
                scored.add(chunk, hidden_NE)
        return scored.targets(self.config.targets_memory_mb)

    def _passes(self, lengths: list[int]) -> list[list[list[int]]]:
        """Cut a window into chunks (they bound activations), and chunks into passes (they bound
        hidden states).
        """
        itemsize = self.head.weight.dtype.itemsize
        chunk_tokens = tokens_per_chunk(self.model, itemsize, self.config.score_memory_mb)
        per_token = self.model.config.get_text_config().hidden_size * itemsize
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
        return zero.run_pass(self.engine, lambda: self._stream(batches, heartbeat))

    def _stream(
        self, batches: list[SequenceBatch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """One pass over the layers for all batches; per batch the hidden states at its completion
        positions.
        """
        forwards = [
            SuspendedForward(partial(causal_lm.completion_hidden, self.model, batch))
            for batch in batches
        ]
        try:
            stops = [forward.go_on() for forward in forwards]
            while isinstance(stops[0], Call):
                assert len({id(call.slot) for call in stops}) == 1, "all chunks go the same way"
                answers = stops[0].slot.streamed(calls=stops)
                stops = [forward.go_on(answer) for forward, answer in zip(forwards, answers)]
                heartbeat()
        finally:
            for forward in forwards:
                forward.abandon()
        return stops

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
        with self.swap_files.in_use():
            return self._decoder.complete(samples, sampling, heartbeat)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(
            self.model,
            "teacher",
            "use another teacher, or set seq_kd to false",
            self.vocabulary,
            self.device,
            self.config.rollout_memory_mb,
            one_pass=self._decode_pass,
            agree=ranks.any_rank,
            recover=partial(zero.forget_order, self.engine),
        )

    def _decode_pass(self, run: Callable[[], Any]) -> Any:
        self.counters.teacher_decode_passes += 1
        return zero.run_pass(self.engine, run)

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
        problem = f"the teacher ({type(self.model).__name__}) cannot be run layer by layer"
        remedy = "use a plain decoder-only architecture"
        probe = sequence_batch(
            [Rollout(0, Source.DATA, [1, 2, 3, 4], [5, 6, 7], True)], self.pad_id, self.device
        )
        causal_lm.require_plain_head(self.model, "teacher")
        zero.run_pass(self.engine, lambda: causal_lm.check_head(self.model, "teacher", self.device))
        zero.forget_order(self.engine)
        with causal_lm.refusing(problem, remedy):
            plain_NE = zero.run_pass(
                self.engine, lambda: causal_lm.completion_hidden(self.model, probe)
            )
            (streamed_NE,) = zero.run_pass(self.engine, lambda: self._stream([probe]))
            if (plain_NE - streamed_NE).abs().max() > 0.02 * plain_NE.abs().max().clamp(min=1.0):
                raise InputError(f"{problem}; {remedy}.")


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(zero.full_numel(p) * p.element_size() for p in parameters)


class _Streamed(nn.Module):
    """The embedding or a decoder layer over all chunks: the unit that ZeRO-3 fetches and releases
    (a leaf module to it).
    """

    def __init__(self, module: nn.Module, following: nn.Module, counters: Counters):
        super().__init__()
        self.module, self.counters = module, counters
        self.ahead = list(following.parameters())

    def forward(self, *, calls: list[Call]) -> list[Any]:
        self.counters.teacher_bytes += _bytes(self.module.parameters())
        nvme.read_ahead(self.ahead)
        return [self.module(*call.args, **call.kwargs) for call in calls]
