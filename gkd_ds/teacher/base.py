"""The student's own base as its teacher: one copy of the weights, the adapter off while it scores.

Shapes: D the model's width, N completion tokens of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from gkd_ds.data.lengths import RowLengths
from gkd_ds.engine import accelerator, adapters, causal_lm, zero
from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.learn.batching import length_groups
from gkd_ds.learn.head import LossHead, TeacherHead
from gkd_ds.learn.student import Student
from gkd_ds.records import Completions, Rollout, Sample, TeacherTargets, sequence_batch
from gkd_ds.rollout.decoder import Decoder, of_student
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import ranks
from gkd_ds.teacher.chunks import TargetsInOrder, tokens_per_chunk

# As in teacher/streamed.py, but here every chunk fetches the weights anew.
CHUNK_OVERHEAD_TOKENS = 256


class BaseTeacher:
    """Says what the student's base says (teacher.py), through the student's engine."""

    def __init__(self, student: Student, pad_id: int):
        self.student, self.pad_id = student, pad_id

    def release(self) -> None:
        """Nothing: the student gives its engine back."""

    @torch.no_grad()
    def score(
        self, rollouts: list[Rollout], heartbeat: Callable[[], None] = lambda: None
    ) -> TeacherTargets:
        """The base's last hidden states at the completion positions of `rollouts`, in their order.

        One pass over the weights per chunk of `score_memory_mb`: the same number on every rank.
        """
        chunks = self._chunks([len(rollout) for rollout in rollouts])
        (count,) = ranks.all_reduce_max([len(chunks)])
        scored = TargetsInOrder(rollouts, self._head.weight)
        with self._base():
            for chunk in chunks + [[]] * (count - len(chunks)):
                scored.add(chunk, self._pass([rollouts[i] for i in chunk]))
                heartbeat()
        return scored.targets(self.student.config.targets_memory_mb)

    def _chunks(self, lengths: list[int]) -> list[list[int]]:
        itemsize, memory_mb = self._head.weight.dtype.itemsize, self.student.config.score_memory_mb
        tokens = tokens_per_chunk(self.student.model, itemsize, memory_mb)
        return length_groups(lengths, tokens, CHUNK_OVERHEAD_TOKENS, self.student.switch)

    def _pass(self, rollouts: list[Rollout]) -> Tensor:
        student = self.student
        student.counters.teacher_passes += 1
        batch = sequence_batch(rollouts, self.pad_id, student.device)
        return student.run_pass(lambda: causal_lm.completion_hidden(student.model, batch))

    def generate(
        self,
        samples: list[Sample],
        sampling: Sampling,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> Completions:
        """Complete prompts for sequence-level distillation, with the base gathered once."""
        student = self.student
        with (
            self._base(),
            zero.gathered_parameters(student.engine, student.counters),
            accelerator.fast_decoding(student.model, linear=(torch.nn.Linear, LossHead)),
        ):
            return self._decoder.complete(samples, sampling, heartbeat)

    @cached_property
    def _decoder(self) -> Decoder:
        return of_student(self.student)

    def try_rows(self, lengths: RowLengths) -> None:
        """Nothing: the student, whose engine this is, tries them."""

    @contextmanager
    def whole_head(self) -> Iterator[TeacherHead]:
        """The base's output layer for one learn phase, which is the student's, too. Collective.

        A copy where it is partitioned: the student's engine releases its own after each use.
        """
        parameters = [p for p in (self._head.weight, self._head.bias) if p is not None]
        copies = [p.detach() for p in parameters]
        if any(zero.is_partitioned(p) for p in parameters):
            with zero.gathered(parameters):
                copies = [p.detach().clone() for p in parameters]
        weight, bias = copies if len(copies) == 2 else (copies[0], None)
        yield TeacherHead(weight, bias, LogitTransform.of(self.student.model.config))

    @property
    def _head(self) -> LossHead:
        return self.student.model.get_output_embeddings()

    @contextmanager
    def _base(self) -> Iterator[None]:
        with self.student.evaluating(), adapters.without(self.student.adapter):
            yield
