"""Both models of a run are lent to engines of their own."""

from __future__ import annotations

import torch

from gkd_ds.engine import lending
from tests.architectures import make_model


def test_models_that_share_a_module_are_separated() -> None:
    """All of OpenAI's GPTs have one activation, where both engines would put hooks."""
    student, teacher = make_model("openai-gpt", 1), make_model("openai-gpt", 2, more_layers=1)
    assert not set(student.modules()).isdisjoint(teacher.modules())
    ids_BT = torch.arange(3, 13)[None]
    before = student(input_ids=ids_BT).logits
    lending.separate(student, teacher)
    assert set(student.modules()).isdisjoint(teacher.modules())
    assert torch.equal(student(input_ids=ids_BT).logits, before)
