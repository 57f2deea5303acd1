"""The student is gathered once per window, and every rank decodes its samples alone.

One gather costs what a single decode step of a partitioned model would cost. It needs the memory of
the whole student on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from gkd_ds.engine import accelerator, adapters, causal_lm, zero
from gkd_ds.learn.head import LossHead
from gkd_ds.records import Completions, Sample
from gkd_ds.rollout.decoding import decode
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.kv_cache import sequences_that_fit
from gkd_ds.rollout.sampling import Sampling


class Gathered(RolloutEngine):
    """`rollout_engine: gather`."""

    @contextmanager
    def window(self) -> Iterator[None]:
        """The whole student on every rank, its adapter merged, laid out for products of few
        rows.
        """
        student = self.student
        with (
            student.sampling(),
            zero.gathered_parameters(student.engine, student.counters),
            adapters.merged(student.model),
            accelerator.fast_decoding(student.model, linear=(nn.Linear, LossHead)),
        ):
            yield

    def generate(
        self, samples: list[Sample], sampling: Sampling, heartbeat: Callable[[], None]
    ) -> Completions:
        """Decode this rank's samples; ranks end at different times."""
        student = self.student
        forward = causal_lm.decoding_forward(student.model, student.vocabulary)
        prompts = [sample.prompt_ids for sample in samples]
        sample_ids = [sample.sample_id for sample in samples]
        room = sequences_that_fit(student.model, samples, sampling, student.config)
        return decode(
            forward, prompts, sample_ids, sampling, student.device, room, heartbeat=heartbeat
        )
