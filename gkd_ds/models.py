"""Both models of a run, as they were loaded, before and between the engines that use them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from gkd_ds.engine import builds, lending, loading
from gkd_ds.engine.adapters import Adapter
from gkd_ds.engine.inputs import Inputs
from gkd_ds.runtime import ranks
from gkd_ds.teacher import loading as teacher_loading

if TYPE_CHECKING:
    from peft import PeftModel


class Models:
    """Loads the teacher, then the student. A collective.

    `student` and `teacher` are whole in a single process (unless they live on NVMe), and
    partitioned on several ranks, where the DeepSpeed files say so. `adapter` is what peft has put
    into the student, if anything; `teacher` is None where the student's base is the teacher. Raises
    InputError.
    """

    @builds.taking_turns()
    def __init__(self, inputs: Inputs):
        config = self._config = inputs.config
        for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
            lending.refuse_lent(model, role)
        self.teacher, self._teacher = None, {}
        if not inputs.teacher_is_base:
            self.teacher, self._teacher = teacher_loading.load(inputs.teacher, config)
            self._attach(inputs.teacher_adapter, self.teacher, trainable=False)
        self._student = loading.student_ds_config(inputs.student, config)
        self.student = loading.load_student(inputs.student, config, self._student)
        self.adapter = self._attach(inputs.student_adapter, self.student, trainable=True)
        for model in filter(None, (self.teacher, self.student, self.adapter)):
            if ranks.world_size() > 1 or not lending.is_lendable(model):
                lending.guard(model)
            else:
                lending.make_whole(model)

    def _attach(
        self, adapter: Adapter | None, model: PreTrainedModel, trainable: bool
    ) -> PeftModel | None:
        if adapter is None:
            return None
        torch.manual_seed(self._config.seed)  # a new adapter depends on nothing drawn before
        return adapter.attach(model, trainable)

    def teacher_ds_config(self) -> dict[str, Any]:
        """What the teacher's engine is started with."""
        return copy.deepcopy(self._teacher)

    def student_ds_config(self) -> dict[str, Any]:
        """What the student's engine is started with, as the configuration is now; its parameters
        are where they were loaded to.
        """
        resolved = loading.resolved_student(self.student, self._config)
        return {**resolved, "zero_optimization": copy.deepcopy(self._student["zero_optimization"])}
