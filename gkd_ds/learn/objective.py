"""What the student is trained on: the door for divergences and other losses per token.

An objective is a function. It gets the logits of both models for a few completion tokens and
returns the loss of each token with its gradient (`TokenLoss`). The chunked head (head.py) does the
rest: it makes the logits, and carries the gradient on to hidden states and weights. The generalized
JSD (divergence.py) brings its gradient in closed form; `by_autograd` makes an objective of a
formula alone, at the price of some memory and time.

Shapes: V shared vocabulary, n completion tokens of one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """fp32, per token; log-probabilities and the student's entropy are in nats."""

    loss_n: Tensor
    gradient_nV: Tensor  # of each token's loss, with respect to the student's logits
    student_logprob_n: Tensor
    teacher_logprob_n: Tensor
    entropy_n: Tensor


# (student logits [n, V], teacher logits [n, V], tokens [n]) -> TokenLoss. The logits are fp32 and
# the objective may overwrite them; `gradient_nV` may live in the student's.
Objective = Callable[[Tensor, Tensor, Tensor], TokenLoss]


def by_autograd(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Objective:
    """The objective of a differentiable `formula(student_nV, teacher_nV, tokens_n) -> loss_n`."""

    def objective(student_nV: Tensor, teacher_nV: Tensor, tokens_n: Tensor) -> TokenLoss:
        with torch.enable_grad():
            student_nV = student_nV.detach().requires_grad_()
            loss_n = formula(student_nV, teacher_nV, tokens_n)
            (gradient_nV,) = torch.autograd.grad(loss_n.sum(), student_nV)
        log_q_nV, log_p_nV = student_nV.detach().log_softmax(-1), teacher_nV.log_softmax(-1)
        index_n1 = tokens_n[:, None]
        return TokenLoss(
            loss_n.detach(),
            gradient_nV,
            student_logprob_n=log_q_nV.gather(1, index_n1)[:, 0],
            teacher_logprob_n=log_p_nV.gather(1, index_n1)[:, 0],
            entropy_n=torch.special.entr(log_q_nV.exp()).sum(-1),
        )

    return objective
