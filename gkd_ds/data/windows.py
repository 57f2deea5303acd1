"""The samples of a window: where the schedule, the order of an epoch and the tokens meet."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.data.schedule import SampleOrder, StepScheduler
from gkd_ds.records import Sample, Source


@dataclass
class Windows:
    """What every window of a run holds: a pure function of (seed, step, rank)."""

    examples: Examples | None  # None where there is nothing to train on
    scheduler: StepScheduler
    order: SampleOrder

    @classmethod
    def of(cls, config: GKDConfig, examples: Examples | None, world_size: int) -> Windows:
        """The windows that a configuration asks for."""
        num_samples = len(examples) if examples is not None else 1
        scheduler = StepScheduler.of(config, num_samples, world_size)
        seed = config.seed if config.data_seed is None else config.data_seed
        return cls(examples, scheduler, SampleOrder(num_samples, seed))

    def read_fields(self, config: GKDConfig) -> None:
        """Who completes the samples of later windows is what the configuration says now."""
        self.scheduler = dataclasses.replace(
            self.scheduler, lmbda=config.lmbda, seq_kd=config.seq_kd
        )

    def samples(self, step: int, rank: int) -> tuple[list[Sample], set[Source]]:
        """The samples of one rank in the window of `step`, and the sources of the whole window."""
        scheduler, epoch = self.scheduler, self.scheduler.epoch_of(step)
        rows = _permutation(self.order, epoch)
        samples = [
            self._sample(epoch, int(rows[place]), scheduler.source_at(step, place))
            for micro_batch in range(scheduler.micro_batches)
            for place in scheduler.places(step, micro_batch, rank)
        ]
        return samples, scheduler.sources(step)

    def micro_batches(self, rank: int) -> list[list[int]]:
        """The rows of one rank's micro-batches in the first epoch, in their order."""
        scheduler, rows = self.scheduler, _permutation(self.order, 0)
        places = (
            scheduler.places(step, micro_batch, rank)
            for step in range(scheduler.windows_per_epoch)
            for micro_batch in range(scheduler.micro_batches)
        )
        return [rows[some.start : some.stop].tolist() for some in places if some]

    def _sample(self, epoch: int, row: int, source: Source) -> Sample:
        examples = self.examples
        sample_id = self.scheduler.sample_id(epoch, row, source)
        return Sample(sample_id, examples.prompt_ids[row], examples.completion_ids[row], source)

    def schedule(self) -> dict[str, Any]:
        """What decides which samples a window holds; a resume must agree on it."""
        names = ("num_samples", "window_samples", "seed", "drop_last")
        schedule = {name: getattr(self.scheduler, name) for name in names}
        return schedule | {
            "data_seed": self.order.seed,
            "training data": self.examples.fingerprint,
        }


@functools.lru_cache(maxsize=1)  # one epoch at a time
def _permutation(order: SampleOrder, epoch: int) -> np.ndarray:
    return order.permutation(epoch)
