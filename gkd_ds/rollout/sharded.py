"""The student stays partitioned: every layer is gathered at every decode step, all ranks in step.

Slow, for students that do not fit one device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from gkd_ds.engine import causal_lm
from gkd_ds.records import Completions, Sample
from gkd_ds.rollout.decoding import decode
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.kv_cache import sequences_that_fit
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
        student = self.student
        forward = causal_lm.decoding_forward(student.model, student.vocabulary)
        prompts = [sample.prompt_ids for sample in samples]
        sample_ids = [sample.sample_id for sample in samples]
        room = sequences_that_fit(student.model, samples, sampling, student.config)

        def in_step(*args) -> Tensor:
            return student.run_pass(lambda: forward(*args))

        return decode(
            in_step, prompts, sample_ids, sampling, student.device, room, ranks.any_rank, heartbeat
        )
