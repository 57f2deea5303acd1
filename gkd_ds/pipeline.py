"""The three phases of a window. Each puts one engine to work on the whole window and hands a record
to the next:

    samples --> rollout --> rollouts --> score --> teacher targets --> learn --> gradients
                student                  teacher                       student
                (or teacher, or data)    weights streamed once         micro-batch by micro-batch

Under ZeRO-3 a rollout costs one gather of the student, and scoring one pass over the teacher's
weights. Both costs are per pass and not per token, so each is paid once per window, whatever its
number of micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine.causal_lm import kv_elements_per_token
from gkd_ds.learn.batching import length_groups
from gkd_ds.learn.divergence import LossInputs, TeacherHead
from gkd_ds.learn.student import Student
from gkd_ds.records import Rollout, Sample, Source, TeacherTargets, sequence_batch
from gkd_ds.rollout.decoding import Completions, Sampling
from gkd_ds.runtime import faults, ranks
from gkd_ds.runtime.watchdog import Watchdog
from gkd_ds.teacher.streamed import Teacher

# A micro-batch more costs about as much as this many padded tokens: ZeRO-3 gathers every layer once
# more.
MICRO_BATCH_OVERHEAD_TOKENS = 256


@dataclass(frozen=True)
class Learned:
    """Per rollout of this rank: sums over its completion tokens, on the host."""

    divergence: list[float]
    student_logprob: list[float]
    teacher_logprob: list[float]
    entropy: list[float]
    micro_batches: int
    padded_tokens: int


class Pipeline:
    """Runs the phases for one rank. Every method is a collective."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        config: GKDConfig,
        sampling: Sampling,
        watchdog: Watchdog,
    ):
        self.student, self.teacher, self.config, self.sampling = student, teacher, config, sampling
        self.watchdog = watchdog
        self.safe_point: Callable[[], None] = lambda: None
        self.seconds: dict[str, float] = {}
        self.decoded_rows = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[], None]]:
        """Times a phase, tells the watchdog that it began, and gives `GKD_FAULT` its place.

        The work inside calls what it is given after each of its parts, so that a long phase is no
        silent one.
        """

        def heartbeat() -> None:
            self.watchdog.beat(name)
            faults.point(f"mid-{name}")

        self.watchdog.beat(name)
        self.safe_point()
        faults.point(name)
        started = time.perf_counter()
        yield heartbeat
        get_accelerator().synchronize()
        self.seconds[name] = time.perf_counter() - started

    @contextmanager
    def interruptible(self, safe_point: Callable[[], None]) -> Iterator[None]:
        """Inside, `safe_point` is called before every phase, on all ranks; it may raise, on all of
        them.
        """
        self.safe_point = safe_point
        try:
            yield
        finally:
            self.safe_point = lambda: None

    # -- rollout
    # --------------------------------------------------------------------------------------

    def rollout(self, samples: list[Sample], sources: set[Source]) -> list[Rollout]:
        """Complete `samples`, in their order. `sources` are those of the whole window, on all
        ranks.

        A source that no rank uses costs nothing; one that any rank uses is run by all of them.
        """
        completed: dict[int, Rollout] = {}
        self.decoded_rows = 0
        with self.phase("rollout") as heartbeat:
            for source, engine in ((Source.STUDENT, self.student), (Source.TEACHER, self.teacher)):
                if source in sources:
                    rows = [row for row, sample in enumerate(samples) if sample.source is source]
                    max_rows = self._max_rows(engine.model, [samples[row] for row in rows])
                    completions = engine.generate(
                        [samples[row] for row in rows], self.sampling, max_rows, heartbeat
                    )
                    self.decoded_rows += completions.decoded_rows
                    completed.update(self._rollouts(rows, samples, completions))
            for row, sample in enumerate(samples):
                if sample.source is Source.DATA:
                    ids = sample.data_completion_ids
                    stopped = ids[-1] in self.sampling.stop_ids
                    completed[row] = Rollout(
                        sample.sample_id, sample.source, sample.prompt_ids, ids, stopped
                    )
        return [completed[row] for row in range(len(samples))]

    def _rollouts(
        self, rows: list[int], samples: list[Sample], completions: Completions
    ) -> dict[int, Rollout]:
        return {
            row: Rollout(
                samples[row].sample_id, samples[row].source, samples[row].prompt_ids, ids, stopped
            )
            for row, ids, stopped in zip(rows, completions.token_ids, completions.stopped)
        }

    def _max_rows(self, model, samples: list[Sample]) -> int | None:
        """How many rows' key-value caches fit `rollout_memory_mb`."""
        if self.config.rollout_memory_mb is None or not samples:
            return None
        longest = max(len(sample.prompt_ids) for sample in samples) + self.sampling.max_new_tokens
        row_bytes = longest * kv_elements_per_token(model) * next(model.parameters()).element_size()
        return max(1, self.config.rollout_memory_mb * 2**20 // row_bytes)

    # -- score
    # --------------------------------------------------------------------------------------

    def score(self, rollouts: list[Rollout]) -> TeacherTargets:
        """One pass of the teacher's weights. The place to serve data completions from a cache of
        targets, later.
        """
        with self.phase("score") as heartbeat:
            return self.teacher.score(rollouts, heartbeat)

    # -- learn
    # --------------------------------------------------------------------------------------

    def learn(self, rollouts: list[Rollout], targets: TeacherTargets, total_tokens: int) -> Learned:
        """Accumulate the gradient of (sum of the divergence over the window) / `total_tokens` (of
        all ranks).
        """
        with self.phase("learn") as heartbeat:
            return self._each_micro_batch(rollouts, targets, total_tokens, heartbeat)

    def measure(self, rollouts: list[Rollout], targets: TeacherTargets) -> Learned:
        """The divergences alone, for evaluation."""
        with self.student.evaluating(), self.phase("evaluation") as heartbeat:
            return self._each_micro_batch(rollouts, targets, None, heartbeat)

    def _each_micro_batch(
        self,
        rollouts: list[Rollout],
        targets: TeacherTargets,
        total_tokens: int | None,
        heartbeat: Callable[[], None],
    ) -> Learned:
        config = self.config
        batch_size = (
            config.per_device_eval_batch_size
            if total_tokens is None
            else config.per_device_train_batch_size
        )
        groups = self._micro_batches([len(rollout) for rollout in rollouts], batch_size)
        device, pad_id = self.student.device, self.sampling.pad_id
        sums_4R = torch.zeros(4, len(rollouts), device=device)
        padded_tokens = 0
        with self.teacher.whole_head() as head:
            for number, group in enumerate(groups):
                batch = sequence_batch([rollouts[row] for row in group], pad_id, device)
                padded_tokens += batch.input_ids_BT.numel()
                inputs = self._loss_inputs(targets.of(group), batch.tokens_N, head)
                loss, *per_token = self.student.loss(batch, inputs)
                if total_tokens is not None:
                    self.student.backward(loss / total_tokens, is_last=number == len(groups) - 1)
                lengths = [len(rollouts[row].completion_ids) for row in group]
                self._add_by_rollout(sums_4R, torch.stack(per_token), group, lengths)
                heartbeat()
        return Learned(*sums_4R.tolist(), micro_batches=len(groups), padded_tokens=padded_tokens)

    def _loss_inputs(
        self, teacher_hidden_NE: Tensor, tokens_N: Tensor, head: TeacherHead
    ) -> LossInputs:
        return LossInputs(
            teacher_hidden_NE=teacher_hidden_NE,
            tokens_N=tokens_N,
            teacher_head=head,
            vocabulary=self.student.vocabulary,
            beta=self.config.beta,
            temperature=self.config.divergence_temperature,
            chunk_bytes=self.config.loss_memory_mb * 2**20,
        )

    def _micro_batches(self, lengths: list[int], batch_size: int) -> list[list[int]]:
        """Groups of similar length, none larger than a batch of the longest.

        Every rank runs as many as the rank with the most; the extra ones are empty.
        """
        limit = self.config.learn_tokens_per_micro_batch or batch_size * max(lengths, default=1)
        groups = length_groups(lengths, limit, MICRO_BATCH_OVERHEAD_TOKENS)
        (count,) = ranks.all_reduce_max([max(len(groups), 1)])
        return groups + [[]] * (count - len(groups))

    @staticmethod
    def _add_by_rollout(
        sums_4R: Tensor, per_token_4N: Tensor, group: list[int], lengths: list[int]
    ) -> None:
        owner = torch.tensor(
            [row for row, length in zip(group, lengths) for _ in range(length)], dtype=torch.long
        )
        sums_4R.index_add_(1, owner.to(sums_4R.device), per_token_4N)


def count_tokens(rollouts: list[Rollout]) -> int:
    """Completion tokens of a window on all ranks; at least 1, because the loss is divided by it."""
    (tokens,) = ranks.all_reduce_sum([sum(len(rollout.completion_ids) for rollout in rollouts)])
    return max(1, int(tokens))
