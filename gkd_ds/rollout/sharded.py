"""The student stays partitioned: every layer is gathered at every decode step, all ranks in step.

Slow, for students that do not fit one device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial

from gkd_ds.engine import zero
from gkd_ds.records import Completions, Sample
from gkd_ds.rollout.decoder import Decoder, of_student
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.sampling import Sampling
from gkd_ds.runtime import ranks


class Sharded(RolloutEngine):
    """`rollout_engine: sharded`."""

    def window(self) -> AbstractContextManager[None]:
        """Nothing is gathered ahead."""
        return self.student.sampling()

    def generate(
        self, samples: list[Sample], sampling: Sampling, heartbeat: Callable[[], None]
    ) -> Completions:
        """Decode until all ranks are through; a rank that has finished runs along."""
        return self._decoder.complete(samples, sampling, heartbeat)

    @cached_property
    def _decoder(self) -> Decoder:
        student = self.student
        return of_student(
            student,
            one_pass=student.run_pass,
            agree=ranks.any_rank,
            recover=partial(zero.forget_order, student.engine),
        )
