"""On two ranks of ZeRO-3, every row comes out as if alone and without noise, or nothing begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import plain
from tests.dist.outcomes import Results, everybody_s_rollouts

SAID = {
    "written across the switch": "the student computes rows of more than 40 tokens with other",
    "written by the teacher": "the teacher computes rows of more than 40 tokens with other",
    "dynamic student": "the student (LlamaForCausalLM) computes every row by the longest in its "
    "batch where that has more than 40 tokens; set max_length to 40",
    "dynamic teacher": "the teacher (LlamaForCausalLM) computes every row by the longest in its "
    "batch where that has more than 40 tokens; set max_length to 40",
    "jitter in training mode": "the student (MixtralForCausalLM) computes with random numbers in "
    "model.layers.0.mlp",
}


@pytest.mark.parametrize("name", ["longrope-s", "jitter"])
def test_every_row_is_learnt_as_if_alone(two_ranks: Results, materials: Path, name: str) -> None:
    ranks = two_ranks["neighbours"]
    (row,) = ranks[0][name]["rows"]
    rollouts = everybody_s_rollouts(ranks, name)
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rollouts]
    assert min(lengths) <= 40 < max(lengths), "rows are on both sides of the switch"
    student, teacher = plain.load(materials / name), plain.load(materials / "longrope-t")
    loss = plain.window_loss(student, teacher, rollouts)
    loss.backward()
    gradients = [p.grad.norm() for p in student.parameters() if p.grad is not None]
    assert row["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(float(torch.stack(gradients).norm()), rel=1e-5)


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_right_is_refused_on_every_rank(two_ranks: Results, name: str) -> None:
    for rank in two_ranks["neighbours"]:
        assert rank["refused"][name].startswith(SAID[name])
