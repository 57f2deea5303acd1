"""Which samples a window holds, in which order, and who completes each of them: pure functions of
(seed, step) and (seed, epoch), equal on every rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from gkd_ds.config.config import GKDConfig
from gkd_ds.records import Source
from gkd_ds.runtime.hashing import INCREMENT, MASK_64, splitmix64, splitmix64_array


def hashed_uniform(*key: int) -> float:
    """A uniform number in [0, 1) that depends on `key` alone (splitmix64, chained over the integers
    of the key).
    """
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = splitmix64(state ^ (part & MASK_64))
    return (state >> 11) / (1 << 53)


@dataclass(frozen=True)
class StepScheduler:
    """Lays the epochs of a dataset out in windows of `micro_batches` x `world_size` x
    `micro_batch_size` samples.

    Micro-batch m of all ranks is one contiguous stretch of the epoch's order, so the same global
    batch holds the same samples for any number of ranks. One source is drawn per stretch of
    `draw_samples`: by default that is a micro-batch of all ranks; a run that goes on with another
    layout keeps the stretches it began with, and so its draws. The last window of an epoch may be
    short (ranks may then have fewer rows, or none) unless `drop_last`.
    """

    num_samples: int
    micro_batch_size: int
    micro_batches: int
    world_size: int
    seed: int
    lmbda: float
    seq_kd: bool
    drop_last: bool = False
    draw_samples: int = 0  # 0: micro_batch_size x world_size
    repeating_share: float = 0.0  # of rows, in an epoch

    def __post_init__(self) -> None:
        if not self.draw_samples:
            object.__setattr__(self, "draw_samples", self.micro_batch_size * self.world_size)

    @classmethod
    def of(cls, config: GKDConfig, num_samples: int, world_size: int) -> StepScheduler:
        """The schedule that a configuration asks for."""
        return cls(
            num_samples=num_samples,
            micro_batch_size=config.per_device_train_batch_size,
            micro_batches=config.gradient_accumulation_steps,
            world_size=world_size,
            seed=config.seed,
            lmbda=config.lmbda,
            seq_kd=config.seq_kd,
            drop_last=config.dataloader_drop_last,
            repeating_share=0.0
            if config.rollout_speculation == "none"
            else config.speculation_share,
        )

    @property
    def window_samples(self) -> int:
        return self.micro_batches * self.world_size * self.micro_batch_size

    @property
    def windows_per_epoch(self) -> int:
        if self.drop_last and self.num_samples >= self.window_samples:
            return self.num_samples // self.window_samples
        return -(-self.num_samples // self.window_samples)

    def epoch_of(self, step: int) -> int:
        return step // self.windows_per_epoch

    def epochs_after(self, updates: int) -> float:
        """How many epochs so many updates are: of an epoch that is not over, the share of its
        micro-batches, as transformers counts them.
        """
        epochs, windows = divmod(updates, self.windows_per_epoch)
        last = self.windows_per_epoch - 1
        in_all = last * self.micro_batches + self.filled_micro_batches(last)
        return epochs + windows * self.micro_batches / in_all

    def samples_until(self, step: int) -> int:
        """Samples of all windows before that of `step`; an epoch's last one may be short."""
        epochs, windows = divmod(step, self.windows_per_epoch)
        of_epoch = min(self.num_samples, self.windows_per_epoch * self.window_samples)
        return epochs * of_epoch + windows * self.window_samples

    def source(self, step: int, stretch: int) -> Source:
        """Student with probability `lmbda`; otherwise the teacher (`seq_kd`) or the dataset.
        lmbda=0 never samples.
        """
        if hashed_uniform(self.seed, 0x50, step, stretch) < self.lmbda:
            return Source.STUDENT
        return Source.TEACHER if self.seq_kd else Source.DATA

    def source_at(self, step: int, place: int) -> Source:
        """Who completes the sample at this place in the epoch's order, in the window of `step`."""
        return self.source(step, (place - self._first_of_window(step)) // self.draw_samples)

    def sample_id(self, epoch: int, row: int, source: Source) -> int:
        """Of a row in an epoch: its own, or, for `repeating_share` of what the student completes,
        the one of the first epoch, and so the same draws.
        """
        if source is Source.STUDENT and (
            hashed_uniform(self.seed, 0x51, epoch, row) < self.repeating_share
        ):
            return row
        return epoch * self.num_samples + row

    def sources(self, step: int) -> set[Source]:
        """Those of the whole window, on all ranks."""
        first = self._first_of_window(step)
        last = min(first + self.window_samples, self.num_samples)
        return {self.source_at(step, place) for place in range(first, last, self.draw_samples)}

    def filled_micro_batches(self, step: int) -> int:
        """Micro-batches of this window in which any rank has a sample."""
        left = min(self.window_samples, self.num_samples - self._first_of_window(step))
        return -(-left // (self.micro_batch_size * self.world_size))

    def places(self, step: int, micro_batch: int, rank: int) -> range:
        """Places in the epoch's order that this rank completes in this micro-batch; may be empty at
        an epoch's end.
        """
        first = (
            self._first_of_window(step)
            + (micro_batch * self.world_size + rank) * self.micro_batch_size
        )
        last = min(first + self.micro_batch_size, self.num_samples)
        return range(min(first, last), last)

    def _first_of_window(self, step: int) -> int:
        return (step % self.windows_per_epoch) * self.window_samples


@dataclass(frozen=True)
class SampleOrder:
    """In which order an epoch visits the samples: a pure function of (seed, epoch), so a position
    is all that a resume needs.

    It is a hash and a stable sort. A library's shuffle may change with the library's version.
    """

    num_samples: int
    seed: int

    def permutation(self, epoch: int) -> np.ndarray:
        """Sample indices in visiting order, int64 of length num_samples; every index exactly
        once.
        """
        digest = hashlib.sha256(f"sample order {self.seed} {epoch}".encode()).digest()
        start = np.frombuffer(digest[:8], dtype="<u8")
        # splitmix64's own generator: its state grows by one increment per sample.
        states = start + (np.arange(self.num_samples, dtype=np.uint64) - np.uint64(1)) * np.uint64(
            INCREMENT
        )
        return np.argsort(splitmix64_array(states), kind="stable").astype(np.int64)
