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

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gkd_ds.data.lengths import RowLengths
from gkd_ds.engine import builds
from gkd_ds.engine.compilation import compile_engine
from gkd_ds.engine.counters import Counters
from gkd_ds.engine.inputs import Inputs
from gkd_ds.learn.batching import length_groups, packed_groups
from gkd_ds.learn.divergence import generalized_jsd_objective
from gkd_ds.learn.head import LossInputs, TeacherHead
from gkd_ds.learn.objective import Objective, by_autograd
from gkd_ds.learn.student import Student
from gkd_ds.models import Models
from gkd_ds.records import (
    Completions,
    Rollout,
    Sample,
    Source,
    TeacherTargets,
    packed_batch,
    sequence_batch,
)
from gkd_ds.rollout.choose import rollout_engine_class
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import faults, ranks
from gkd_ds.runtime.watchdog import Watchdog
from gkd_ds.teacher.base import BaseTeacher
from gkd_ds.teacher.streamed import StreamedTeacher
from gkd_ds.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

# One more micro-batch costs about as much as this many padded tokens: ZeRO-3 gathers every layer
# once more.
MICRO_BATCH_OVERHEAD_TOKENS = 256

# (beta, temperature, student logits [n, V], teacher logits [n, V], tokens [n]) -> loss [n]
Formula = Callable[[float, float, Tensor, Tensor, Tensor], Tensor]


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
        inputs: Inputs,
        student: Student,
        rollout_engine: RolloutEngine,
        teacher: Teacher,
        counters: Counters,
        formula: Formula | None = None,
    ):
        self.inputs, self.config, self._formula = inputs, inputs.config, formula
        self.student, self.rollout_engine, self.teacher = student, rollout_engine, teacher
        self.counters = counters
        self.watchdog = Watchdog(self.config.watchdog_timeout, self.config.output_dir)
        self.safe_point: Callable[[], None] = lambda: None
        self.seconds: dict[str, float] = {}
        self.decoded_sequences = self.drafted_tokens = self.accepted_tokens = 0
        self.read_fields()

    @classmethod
    @builds.taking_turns()
    def build(
        cls,
        inputs: Inputs,
        models: Models,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler],
        passed: tuple[str, ...] = (),
        formula: Formula | None = None,
    ) -> Pipeline:
        """Build the engines of both models, the teacher's first, and try them out. For `optimizer`,
        `scheduler` and `passed` see Student; `formula` is another loss than the generalized JSD.
        Raises InputError.
        """
        config, counters = inputs.config, Counters()
        teacher_config, separate = models.teacher_ds_config(), None
        if teacher_config is not None:
            vocabulary, pad_id = inputs.vocabulary, inputs.pad_id
            separate = StreamedTeacher(
                models.teacher, config, teacher_config, vocabulary, pad_id, counters
            )
            logger.info("The teacher is ready.")
        engine_class = rollout_engine_class(config, models.student)
        student = Student(
            models.student,
            config,
            models.student_ds_config(),
            inputs.vocabulary,
            counters,
            optimizer,
            scheduler,
            passed,
            prepare=engine_class.prepare,
            adapter=models.adapter,
        )
        logger.info("The student is ready.")
        teacher = separate or BaseTeacher(student, inputs.pad_id)
        pipeline = cls(inputs, student, engine_class(student), teacher, counters, formula)
        pipeline._try_decoding()
        pipeline.try_rows(inputs.lengths)
        compile_engine(student.engine, inputs.config)  # after what runs only once
        return pipeline

    def read_fields(self) -> None:
        """What the configuration says about sampling and about the loss counts from now on."""
        config, inputs = self.config, self.inputs
        self.sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            stop_ids=tuple(inputs.stop_ids),
            pad_id=inputs.pad_id,
            vocabulary=inputs.vocabulary,
            max_length=config.max_length,
        )
        beta, temperature = config.beta, config.divergence_temperature
        self.objective: Objective = (
            generalized_jsd_objective(beta, temperature)
            if self._formula is None
            else by_autograd(functools.partial(self._formula, beta, temperature))
        )

    def release(self) -> None:
        """Take the engines down: both models are models again. One process only."""
        self.teacher.release()
        self.student.release()

    def _try_decoding(self) -> None:
        """Completing nothing tries out how the models decode, so that it is known here what
        cannot.
        """
        if self.inputs.samples_from_student:
            with self.rollout_engine.window():
                self.rollout_engine.generate([], self.sampling, lambda: None)
        if self.inputs.samples_from_teacher:
            self.teacher.generate([], self.sampling, lambda: None)

    def try_rows(self, lengths: RowLengths) -> None:
        """Raise InputError where rows of these lengths would not come out as if each were alone."""
        self.teacher.try_rows(lengths)
        self.student.try_rows(lengths)

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
        logger.debug("%s begins.", name)
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

    # -- rollout -----------------------------------------------------------------------------------

    def rollout(self, samples: list[Sample], sources: set[Source]) -> list[Rollout]:
        """Complete `samples`, in their order. `sources` are those of the whole window, on all
        ranks.

        A source that no rank uses costs nothing; one that any rank uses is run by all of them.
        """
        completed: dict[int, Rollout] = {}
        self.decoded_sequences = self.drafted_tokens = self.accepted_tokens = 0
        with self.phase("rollout") as heartbeat:
            for source, complete in (
                (Source.STUDENT, self._complete_by_student),
                (Source.TEACHER, self._complete_by_teacher),
            ):
                if source in sources:
                    indices = [i for i, sample in enumerate(samples) if sample.source is source]
                    completions = complete([samples[i] for i in indices], heartbeat)
                    self.decoded_sequences += completions.decoded_sequences
                    self.drafted_tokens += completions.drafted_tokens
                    self.accepted_tokens += completions.accepted_tokens
                    completed.update(_rollouts(indices, samples, completions))
            for index, sample in enumerate(samples):
                if sample.source is Source.DATA:
                    ids = sample.data_completion_ids
                    stopped = ids[-1] in self.sampling.stop_ids
                    completed[index] = Rollout(
                        sample.sample_id, sample.source, sample.prompt_ids, ids, stopped
                    )
        return [completed[index] for index in range(len(samples))]

    def _complete_by_student(
        self, samples: list[Sample], heartbeat: Callable[[], None]
    ) -> Completions:
        with self.rollout_engine.window():
            return self.rollout_engine.generate(samples, self.sampling, heartbeat)

    def _complete_by_teacher(
        self, samples: list[Sample], heartbeat: Callable[[], None]
    ) -> Completions:
        return self.teacher.generate(samples, self.sampling, heartbeat)

    # -- score -------------------------------------------------------------------------------------

    def score(self, rollouts: list[Rollout]) -> TeacherTargets:
        """The teacher's targets: one pass over its weights."""
        with self.phase("score") as heartbeat:
            return self.teacher.score(rollouts, heartbeat)

    # -- learn -------------------------------------------------------------------------------------

    def learn(self, rollouts: list[Rollout], targets: TeacherTargets, total_tokens: int) -> Learned:
        """Accumulate the gradient of (sum of the divergence over the window) / `total_tokens` (of
        all ranks).
        """
        with self.phase("learn") as heartbeat:
            return self._each_micro_batch(rollouts, targets, total_tokens, heartbeat)

    def measure(self, rollouts: list[Rollout], targets: TeacherTargets) -> Learned:
        """The losses alone, for evaluation."""
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
        packs = config.packs(evaluating=total_tokens is None)
        lengths = [len(rollout) for rollout in rollouts]
        groups = self._micro_batches(lengths, batch_size, packs)
        in_one_batch = packed_batch if packs else sequence_batch
        device, pad_id = self.student.device, self.sampling.pad_id
        sums_4R = torch.zeros(4, len(rollouts), device=device)
        padded_tokens = 0
        with self.teacher.whole_head() as head:
            for number, group in enumerate(groups):
                batch = in_one_batch([rollouts[i] for i in group], pad_id, device)
                padded_tokens += batch.input_ids_BT.numel()
                inputs = self._loss_inputs(targets, group, batch.tokens_N, head)
                loss, *per_token = self.student.loss(batch, inputs)
                if total_tokens is not None:
                    self.student.backward(loss / total_tokens, is_last=number == len(groups) - 1)
                lengths = [len(rollouts[i].completion_ids) for i in group]
                self._add_by_rollout(sums_4R, torch.stack(per_token), group, lengths)
                heartbeat()
        return Learned(*sums_4R.tolist(), micro_batches=len(groups), padded_tokens=padded_tokens)

    def _loss_inputs(
        self, targets: TeacherTargets, group: list[int], tokens_N: Tensor, head: TeacherHead
    ) -> LossInputs:
        return LossInputs(
            targets_NE=targets.of(group),
            form=targets.form,
            teacher_head=head,
            tokens_N=tokens_N,
            vocabulary=self.student.vocabulary,
            objective=self.objective,
            chunk_bytes=self.config.loss_memory_mb * 2**20,
        )

    def _micro_batches(self, lengths: list[int], batch_size: int, packs: bool) -> list[list[int]]:
        """Groups of similar length, or (`packs`) of any, none larger than a batch of the longest.

        Every rank runs as many as the rank with the most; the extra ones are empty.
        """
        limit = self.config.learn_tokens_per_micro_batch or batch_size * max(lengths, default=1)
        if packs:
            groups = packed_groups(lengths, limit)
        else:
            switch = self.student.switch
            groups = length_groups(lengths, limit, MICRO_BATCH_OVERHEAD_TOKENS, switch)
        (count,) = ranks.all_reduce_max([max(len(groups), 1)])
        return groups + [[]] * (count - len(groups))

    @staticmethod
    def _add_by_rollout(
        sums_4R: Tensor, per_token_4N: Tensor, group: list[int], lengths: list[int]
    ) -> None:
        owner = torch.tensor(
            [i for i, length in zip(group, lengths) for _ in range(length)], dtype=torch.long
        )
        sums_4R.index_add_(1, owner.to(sums_4R.device), per_token_4N)


def _rollouts(
    indices: list[int], samples: list[Sample], completions: Completions
) -> dict[int, Rollout]:
    """The completed samples, by their index among all."""
    return {
        i: Rollout(samples[i].sample_id, samples[i].source, samples[i].prompt_ids, ids, stopped)
        for i, ids, stopped in zip(indices, completions.token_ids, completions.stopped)
    }


def count_tokens(rollouts: list[Rollout]) -> int:
    """Completion tokens of a window on all ranks; at least 1, because the loss is divided by it."""
    (tokens,) = ranks.all_reduce_sum([sum(len(rollout.completion_ids) for rollout in rollouts)])
    return max(1, int(tokens))
