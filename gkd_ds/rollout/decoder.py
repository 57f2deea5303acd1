"""How one model decodes: found out at start-up, by trying.

There are several ways, each slower than the one before and asking less of the model. The first that
gives the logits of the model's own full forward is used. A model for which none does is refused
before training, with one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_ds.engine.cache_size import measured
from gkd_ds.engine.causal_lm import cached_forward, decoding_forward, logits, whole_forward
from gkd_ds.learn.student import Student
from gkd_ds.records import Completions, Rollout, Sample, Source, sequence_batch
from gkd_ds.rollout.batch import Batch
from gkd_ds.rollout.decoding import PaddedBatch, decode
from gkd_ds.rollout.lockstep import LockstepBatch, WholeLockstepBatch
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, first_line

logger = logging.getLogger(__name__)


ForwardOf = Callable[[PreTrainedModel, int], Callable]  # of a model and a vocabulary


@dataclass(frozen=True)
class Way:
    """A kind of batch, the forward that it calls, and one that makes a cache of the same size."""

    name: str
    batch_class: type[Batch]
    forward_of: ForwardOf
    sizing: ForwardOf


WAYS = (
    Way("padded", PaddedBatch, decoding_forward, cached_forward),
    Way("in lockstep", LockstepBatch, cached_forward, cached_forward),
    Way("in lockstep to the end", WholeLockstepBatch, cached_forward, cached_forward),
    Way("in lockstep and without a cache", LockstepBatch, whole_forward, whole_forward),
)

# What is tried: prompts of different lengths that end at different times, one of them waiting for a
# place. Small ids are nothing special in most vocabularies.
PROMPTS = [list(range(5, 5 + length)) for length in (7, 3, 5, 2)]
PLACES = 3
TRIAL = Sampling(6, 0.0, 0, (), 0, vocabulary=0, max_length=11)
# How far logits may be off, as a share of their norm: half-precision weights leave that much to the
# order of sums, and a router may choose another expert for a token here and there.
TOLERANCE, HALF_TOLERANCE, OUTLIER = 0.002, 0.05, 5


def of_student(student: Student, **steps: Any) -> Decoder:
    """The student's decoder; `steps` are those of Decoder. A collective."""
    return Decoder(
        student.model,
        "student",
        "use another student, or set lmbda to 0 and eval_on_policy to false",
        student.vocabulary,
        student.device,
        student.config.rollout_memory_mb,
        **steps,
    )


class Decoder:
    """Completes samples with `model`. Making one, and using it, is a collective.

    Args: `remedy` says what to do about a model that cannot decode; `memory_mb` bounds what the
    cache keeps (None: no bound); `one_pass` runs a forward, in step with the other ranks where
    parameters are partitioned, with `agree` (see decode); `recover` is called when a forward has
    raised. Raises InputError, on all ranks, where no way gives the logits of the full forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: str,
        remedy: str,
        vocabulary: int,
        device: torch.device,
        memory_mb: int | None,
        one_pass: Callable[[Callable[[], Any]], Any] = lambda run: run(),
        agree: Callable[[bool], bool] = bool,
        recover: Callable[[], None] = lambda: None,
    ):
        self.model, self.vocabulary, self.device = model, vocabulary, device
        self.memory_mb, self.one_pass, self.agree = memory_mb, one_pass, agree
        self.way = self._choose(f"the {role} ({type(model).__name__})", remedy, recover)
        if memory_mb is not None:
            self.cache_size = measured(self._forward(self.way.sizing), device)

    def complete(
        self,
        samples: list[Sample],
        sampling: Sampling,
        heartbeat: Callable[[], None],
        begun: list[list[int]] | None = None,
    ) -> Completions:
        """Complete `samples`, in their order; `begun` as in decode."""
        prompts = [sample.prompt_ids for sample in samples]
        return decode(
            self._forward(self.way.forward_of),
            prompts,
            [sample.sample_id for sample in samples],
            sampling,
            self.device,
            self._places(prompts, sampling),
            self.agree,
            heartbeat,
            self.way.batch_class,
            begun,
        )

    def _forward(self, forward_of: ForwardOf) -> Callable:
        forward = forward_of(self.model, self.vocabulary)
        return lambda *args: self.one_pass(lambda: forward(*args))

    def _places(self, prompts: list[list[int]], sampling: Sampling) -> int | None:
        """How many sequences fit `memory_mb`; None: as many as there are."""
        if self.memory_mb is None or not prompts:
            return None
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        bytes_each = self.cache_size.of(longest) * next(self.model.parameters()).element_size()
        return max(1, self.memory_mb * 2**20 // max(1, bytes_each))

    # -- the way -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, name: str, remedy: str, recover: Callable[[], None]) -> Way:
        """The first way that is right, on all ranks."""
        problems = []
        for way in WAYS:
            try:
                problem = self._problem(way)
            except (torch.OutOfMemoryError, torch.distributed.DistError):
                raise
            except Exception as error:  # anything that an architecture's own code may say
                problem = f"{type(error).__name__}: {first_line(error)}"
                recover()
            if not ranks.any_rank(problem is not None):
                break
            problems.append(problem or "it goes wrong on another rank")
        else:
            raise InputError(
                f"{name} cannot write completions: decoding step by step does not give the logits "
                f"of its own forward ({problems[-1]}); {remedy}."
            )
        if problems and ranks.rank() == 0:
            logger.warning(
                "%s decodes %s, which is slower; %s does not work (%s).",
                name, way.name, WAYS[0].name, problems[0],
            )  # fmt: skip
        return way

    def _problem(self, way: Way) -> str | None:
        """What is wrong with a way; None if it gives the logits of the full forward."""
        completions, steps = self._try(way)
        sequences = [prompt + ids for prompt, ids in zip(PROMPTS, completions.token_ids)]
        rollouts = [Rollout(0, Source.STUDENT, ids, [], False) for ids in sequences]
        ids_RT = sequence_batch(rollouts, 0, self.device).input_ids_BT
        full_RTV = self.one_pass(lambda: logits(self.model, ids_RT))[..., : self.vocabulary].float()
        deviations: list[list[float]] = [[] for _ in PROMPTS]
        for rows, places, logits_BV in steps:
            expected_BV = full_RTV[rows, places]
            spread_B = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm(dim=-1)
            deviation_B = (logits_BV.float() - expected_BV).norm(dim=-1) / spread_B
            for row, place, deviation in zip(rows, places, deviation_B.tolist()):
                if place + 1 < len(sequences[row]):  # else nobody would read it
                    deviations[row].append(deviation)
        is_full = next(self.model.parameters()).dtype == torch.float32
        tolerance = TOLERANCE if is_full else HALF_TOLERANCE
        worst = max(map(max, deviations))
        if worst <= OUTLIER * tolerance and max(map(median, deviations)) <= tolerance:
            return None
        return f"they are off by {worst:.2g} of their norm"

    def _try(self, way: Way) -> tuple[Completions, list[tuple[list[int], list[int], Tensor]]]:
        """Decode greedily: what was written, and for every forward the prompts in it, the position
        of each, and their logits.
        """
        last: list[Any] = []
        forward = self._forward(way.forward_of)

        def noting(*args):
            answer = forward(*args)
            last[:] = args[-2][:, -1], answer[0] if isinstance(answer, tuple) else answer
            return answer

        steps = []

        def note(prompt_B: Tensor) -> None:
            places_B, logits_BV = last
            steps.append((prompt_B.tolist(), places_B.expand(prompt_B.shape).tolist(), logits_BV))

        sampling = replace(TRIAL, vocabulary=self.vocabulary)
        ids = list(range(len(PROMPTS)))
        batch = way.batch_class(noting, PROMPTS, ids, sampling, self.device, PLACES)
        while batch.live or batch.waiting:
            if batch.wants_refill():
                before = batch.live
                batch.refill()
                note(batch.prompt_B[before:])
            batch.advance(1)
            note(batch.prompt_B)
            batch.drop_finished()
        return batch.completions(), steps
