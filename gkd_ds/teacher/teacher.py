"""The door for teachers: what the phases of a window ask of one.

streamed.py is the first: the teacher's weights here, layer by layer. A new one (served, cached,
several) is a class in a file of its own with these methods; `Pipeline.build` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from gkd_ds.data.lengths import RowLengths
from gkd_ds.learn.head import TeacherHead
from gkd_ds.records import Completions, Rollout, Sample, TeacherTargets
from gkd_ds.rollout.sampling import Sampling


class Teacher(Protocol):
    """Says what it thinks of completions, and writes some itself. Every method is a collective,
    also for a rank that brings nothing.
    """

    def score(self, rollouts: list[Rollout], heartbeat: Callable[[], None]) -> TeacherTargets:
        """The targets of `rollouts`, in their order; they say which form they have."""

    def generate(
        self, samples: list[Sample], sampling: Sampling, heartbeat: Callable[[], None]
    ) -> Completions:
        """Complete `samples`, for sequence-level distillation."""

    def try_rows(self, lengths: RowLengths) -> None:
        """Before training: raise InputError where a row's targets would depend on others."""

    def whole_head(self) -> AbstractContextManager[TeacherHead]:
        """Around a learn phase: what turns hidden states into logits, whole on every rank."""

    def release(self) -> None:
        """In a single process: end its engine, so that its model is a model again."""
