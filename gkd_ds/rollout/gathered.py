"""The student is gathered once per window, and every rank decodes its samples alone.

One gather costs what a single decode step of a partitioned model would cost. It needs the memory of
the whole student on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from gkd_ds.engine import accelerator, adapters, zero
from gkd_ds.learn.head import LossHead
from gkd_ds.records import Completions, Sample
from gkd_ds.rollout import speculation
from gkd_ds.rollout.decoder import Decoder, of_student
from gkd_ds.rollout.engine import RolloutEngine
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
        """Decode this rank's samples, from their drafts on; ranks end at different times."""
        return speculation.complete(self.student, self._decoder, samples, sampling, heartbeat)

    @cached_property
    def _decoder(self) -> Decoder:
        return of_student(self.student)
