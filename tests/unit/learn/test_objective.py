"""The door for objectives: one that is a formula alone, beside the one with a closed gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.learn.divergence import generalized_jsd, generalized_jsd_objective
from gkd_ds.learn.head import LossHead, LossInputs, TeacherHead
from gkd_ds.learn.objective import Objective, by_autograd
from gkd_ds.records import TargetForm
from tests.unit.learn.formulas import BETAS


def reverse_kl(student_nV: Tensor, teacher_nV: Tensor, tokens_n: Tensor) -> Tensor:
    log_q, log_p = student_nV.log_softmax(-1), teacher_nV.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def through_the_head(objective: Objective) -> list[Tensor]:
    """Loss, per-token values and gradients of a small case."""
    torch.manual_seed(0)
    head, hidden_ND = LossHead(nn.Linear(12, 40), LogitTransform(softcap=5.0)), torch.randn(70, 12)
    inputs = LossInputs(
        targets_NE=torch.randn(70, 8),
        form=TargetForm.HIDDEN_STATES,
        teacher_head=TeacherHead(torch.randn(40, 8), None, LogitTransform()),
        tokens_N=torch.randint(0, 40, (70,)),
        vocabulary=40,
        objective=objective,
        chunk_bytes=1,  # several chunks
    )
    loss, *per_token = head(hidden_ND.requires_grad_(), loss=inputs)
    loss.backward()
    return [loss, *per_token, hidden_ND.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("beta", BETAS)
def test_a_formula_alone_gives_what_the_closed_gradient_gives(beta: float) -> None:
    formula = by_autograd(lambda q, p, _: generalized_jsd(q, p, beta).sum(-1))
    for ours, closed in zip(
        through_the_head(formula), through_the_head(generalized_jsd_objective(beta)), strict=True
    ):
        torch.testing.assert_close(ours, closed, rtol=1e-4, atol=1e-5)


def test_another_divergence_is_a_function() -> None:
    for ours, jsd in zip(
        through_the_head(by_autograd(reverse_kl)),
        through_the_head(generalized_jsd_objective(1.0)),
        strict=True,
    ):
        torch.testing.assert_close(ours, jsd, rtol=1e-4, atol=1e-5)


def test_a_formula_may_look_at_the_tokens() -> None:
    def cross_entropy(student_nV: Tensor, teacher_nV: Tensor, tokens_n: Tensor) -> Tensor:
        return -student_nV.log_softmax(-1).gather(1, tokens_n[:, None])[:, 0]

    _, loss_N, student_logprob_N, *_ = through_the_head(by_autograd(cross_entropy))
    torch.testing.assert_close(loss_N, -student_logprob_N)
