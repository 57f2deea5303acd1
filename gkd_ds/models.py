"""Both models of a run, as they were loaded, before and between the engines that use them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from gkd_ds.engine import builds, lending, loading
from gkd_ds.engine.inputs import Inputs
from gkd_ds.runtime import ranks
from gkd_ds.teacher import loading as teacher_loading

if TYPE_CHECKING:
    from peft import PeftModel


class Models:
    """Loads the teacher, then the student, and puts their adapters into them. A collective.

    `student` and `teacher` are whole in a single process (unless they live on NVMe), and
    partitioned on several ranks, where the DeepSpeed files say so. `adapter` is peft's model around
    the student, where it has one. A teacher that is the student's base is the same object. Raises
    InputError.
    """

    @builds.taking_turns()  # a teacher on NVMe needs the reader already here
    def __init__(self, inputs: Inputs):
        config = self._config = inputs.config
        for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
            lending.refuse_lent(model, role)
        self.adapter: PeftModel | None = None
        self._teacher: dict[str, Any] | None = None
        if not inputs.teacher_is_base:
            teacher, self._teacher = teacher_loading.load(inputs.teacher, config)
            _prepare(teacher)
            if inputs.teacher_adapter is not None:
                inputs.teacher_adapter.attach(teacher, trainable=False)
        self._student = loading.student_ds_config(inputs.student, config)
        self.student = loading.load_student(inputs.student, config, self._student)
        _prepare(self.student)
        if inputs.student_adapter is not None:
            # A new adapter's numbers depend on nothing that was drawn before.
            torch.manual_seed(config.seed)
            self.adapter = inputs.student_adapter.attach(self.student, trainable=True)
        self.teacher: PreTrainedModel = self.student if inputs.teacher_is_base else teacher
        if self.teacher is not self.student:
            lending.separate(self.student, self.teacher)

    @property
    def are_lendable(self) -> bool:
        """Whether engines can give both models back."""
        return ranks.world_size() == 1 and all(
            map(lending.is_lendable, (self.student, self.teacher))
        )

    def teacher_ds_config(self) -> dict[str, Any] | None:
        """What the teacher's engine is started with; None where it has none of its own."""
        return copy.deepcopy(self._teacher)

    def student_ds_config(self) -> dict[str, Any]:
        """What the student's engine is started with, as the configuration is now; its parameters
        are where they were loaded to.
        """
        resolved = loading.resolved_student(self.student, self._config)
        return {**resolved, "zero_optimization": copy.deepcopy(self._student["zero_optimization"])}


def _prepare(model: PreTrainedModel) -> None:
    if ranks.world_size() > 1 or not lending.is_lendable(model):
        lending.guard(model)
    else:
        lending.make_whole(model)
