"""The door for ways in which the student samples: what a rollout engine is.

    with engine.window():                                   # once per window, on all ranks
        completions = engine.generate(samples, sampling, heartbeat)

A new one is a class in a file of its own, a line in choose.py and a value of the field
`rollout_engine`. Whatever an engine does, a token is the one that sampling.py draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from gkd_ds.engine import zero
from gkd_ds.learn.student import Student
from gkd_ds.records import Completions, Sample
from gkd_ds.rollout.sampling import Sampling


class RolloutEngine(ABC):
    """Completes the prompts of a window with the student. Every method is a collective."""

    def __init__(self, student: Student):
        """Raises InputError where the engine is not possible for this student."""
        self.student = student

    @staticmethod  # noqa: B027 - most engines have nothing to prepare
    def prepare(ds_config: dict[str, Any], root: zero.EngineRoot, model: PreTrainedModel) -> None:
        """Change what the student's DeepSpeed engine is made of, before it exists."""

    @abstractmethod
    def window(self) -> AbstractContextManager[None]:
        """What the engine needs around the sampling of a window; it is undone whatever happens."""

    @abstractmethod
    def generate(
        self, samples: list[Sample], sampling: Sampling, heartbeat: Callable[[], None]
    ) -> Completions:
        """Complete `samples`, in their order; call `heartbeat` often. Called inside of `window`,
        also on a rank without samples.

        Raises InputError, on all ranks, where the student cannot be sampled from: when there are no
        samples at all, too, so that it is known before training. What samples have as drafts may
        be used or not: it makes no difference to a token.
        """
