"""The engines of a trainer: when they exist, and with which optimizer.

    with self.engines() as pipeline:
        pipeline.rollout(...)

In one process they exist inside of train(), evaluate() and predict() and nowhere else, so that
before, between and after these the models are models: `trainer.model.generate(...)`, another
trainer on the same objects. On several ranks nobody has room for a whole model, and with a model on
NVMe neither has one process: the engines stay once they were needed.
"""

from __future__ import annotations

import gc
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine.inputs import Inputs
from gkd_ds.learn.optim import decayed_parameters, make_optimizer, make_scheduler
from gkd_ds.learn.student import Student
from gkd_ds.models import Models
from gkd_ds.pipeline import Formula, Pipeline
from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher.teacher import Teacher


class Engines(ABC):
    """Both models of `inputs`, and their pipeline while there is one.

    `optimizers` is the caller's (torch optimizer, scheduler), either of which may be None. Building
    engines is a collective; it may raise InputError.
    """

    state: TrainerState  # says how many updates the schedule has

    def __init__(self, inputs: Inputs, optimizers: tuple):
        self.inputs, self.models = inputs, Models(inputs)
        self.optimizer, self.lr_scheduler = optimizers
        self._own: tuple = (None, None)  # made here, and made anew for the next engine
        self._pipeline: Pipeline | None = None
        self._users = 0

    @property
    def args(self) -> GKDConfig:
        """The configuration."""
        return self.inputs.config

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.inputs.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The student, with its adapter around it where it has one."""
        return self.models.adapter or self.models.student

    @property
    def teacher_model(self) -> PreTrainedModel:
        """The teacher."""
        return self.models.teacher

    def formula(self) -> Formula | None:
        """A loss in place of the generalized JSD."""
        return None

    @contextmanager
    def engines(self) -> Iterator[Pipeline]:
        """Inside, the pipeline exists; whoever comes last takes it down, in one process."""
        self._users += 1
        try:
            yield self.pipeline
        finally:
            self._users -= 1
            if not self._users and self._pipeline is not None and self.models.are_lendable:
                self._pipeline.release()
                self._pipeline = None
                gc.collect()  # engines hold themselves, and the optimizer's states with them
                get_accelerator().empty_cache()

    @property
    def pipeline(self) -> Pipeline:
        """The phases of a window; built when it is asked for first."""
        if self._pipeline is None:
            self._pipeline = self._build()
        return self._pipeline

    def _build(self) -> Pipeline:
        given = [
            None if one is own else one
            for one, own in zip((self.optimizer, self.lr_scheduler), self._own)
        ]
        self.optimizer, self.lr_scheduler = given
        self._make_optimizer()
        scheduler = self.lr_scheduler or self._make_scheduler
        passed = self._passed(given)
        pipeline = Pipeline.build(
            self.inputs, self.models, self.optimizer, scheduler, passed, self.formula()
        )
        engine = pipeline.student.engine
        made = self.optimizer, self.lr_scheduler = engine.basic_optimizer, engine.lr_scheduler
        self._own = tuple(one if before is None else None for one, before in zip(made, given))
        return pipeline

    def renew_engines(self) -> None:
        """Engines that have learned, if there are any, begin again: without moments, and with the
        schedule of what the configuration asks for now. The weights stay.
        """
        if self._pipeline is None:
            return
        engine, (own_optimizer, own_scheduler) = self.student.engine, self._own
        self.student.forget_moments()
        if own_scheduler is not None:
            is_ours = "optimizer" not in self.student.passed and not self._file_has_optimizer()
            for group in engine.basic_optimizer.param_groups:
                before = group.pop("initial_lr")  # the next schedule notes the rate as its own
                group["lr"] = self.args.learning_rate if is_ours else before
            self.lr_scheduler = None
            engine.lr_scheduler = self._make_scheduler(engine.basic_optimizer)
            self._own = (own_optimizer, self.lr_scheduler)

    @property
    def student(self) -> Student:
        """The student's engine."""
        return self.pipeline.student

    @property
    def teacher(self) -> Teacher:
        """The teacher's engine."""
        return self.pipeline.teacher

    # -- what subclasses override, as with transformers -------------------------------------------

    def create_optimizer(self, model: PreTrainedModel | None = None) -> Optimizer | None:
        """Set `self.optimizer`, unless there is one; None where the DeepSpeed file says what it
        is.
        """
        if self.optimizer is None and not self._file_has_optimizer():
            model = self.model if model is None else model
            decayed = self.get_decay_parameter_names(model)
            self.optimizer = make_optimizer(model, self.args, decayed)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Set `self.lr_scheduler`, unless there is one."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_scheduler(optimizer, self.args, num_training_steps)
        return self.lr_scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Both of the above."""
        self.create_optimizer()
        if self.optimizer is not None:
            self.create_scheduler(num_training_steps=num_training_steps)

    def get_decay_parameter_names(self, model: PreTrainedModel) -> list[str]:
        """The names of the parameters that `weight_decay` shrinks."""
        return decayed_parameters(model)

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Engines, name)

    def _passed(self, given: list) -> tuple[str, ...]:
        """What of "optimizer" and "schedule" is the caller's."""
        both = self._overrides("create_optimizer_and_scheduler")
        names = {"optimizer": "create_optimizer", "schedule": "create_scheduler"}
        return tuple(
            what
            for one, (what, method) in zip(given, names.items())
            if one is not None or both or self._overrides(method)
        )

    def _make_optimizer(self) -> None:
        if self._overrides("create_optimizer_and_scheduler"):
            self.create_optimizer_and_scheduler(num_training_steps=self.state.max_steps)
        else:
            self.create_optimizer()
        if self.optimizer is None and not self._file_has_optimizer():
            raise InputError(
                f"create_optimizer of {type(self).__name__} has not set self.optimizer; set it."
            )

    def _make_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """For the optimizer of the engine that is being made."""
        self.optimizer = optimizer
        self.create_scheduler(num_training_steps=self.state.max_steps)
        return self.lr_scheduler

    def _file_has_optimizer(self) -> bool:
        file, _ = self.args.read_deepspeed_files()
        return "optimizer" in (file or {})
