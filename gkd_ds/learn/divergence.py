"""The generalized Jensen-Shannon divergence of GKD: the formula, and its gradient in closed form.

Agarwal et al. 2023 (arXiv 2306.13649), eq. 1, in TRL's orientation: with P the teacher, Q the
student and M = beta*P + (1-beta)*Q,

    L = beta*KL(P||M) + (1-beta)*KL(Q||M)
    beta = 0: exactly KL(P||Q)        beta = 1: exactly KL(Q||P)

The mixture form itself tends to 0 at both ends (L/beta -> KL(P||Q) as beta -> 0), so the scale of
the loss jumps there.

Shapes: V shared vocabulary, n completion tokens of one tile.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_ds.learn.objective import Objective, TokenLoss

# The log-probability of a token that a model rules out (logit -inf): exp of it is 0, differences
# stay finite.
_IMPOSSIBLE = -1e4


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """Dense reference: the divergence per vocabulary entry, differentiable by autograd in any float
    dtype.

    Args: logits `[..., V]` of both models (-inf allowed: terms with p = 0 or q = 0 are 0), `beta`
    in [0, 1]; `temperature` > 0 divides both logits. Returns `[..., V]`; its sum over V is the
    divergence of a position.
    """
    log_q = F.log_softmax(student_logits / temperature, dim=-1).clamp(min=_IMPOSSIBLE)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1).clamp(min=_IMPOSSIBLE)
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def generalized_jsd_objective(beta: float, temperature: float = 1.0) -> Objective:
    """The generalized JSD as an objective of the learn phase: weights and temperature are fixed."""
    return partial(_generalized_jsd_, beta=beta, temperature=temperature)


def _generalized_jsd_(
    student_logits_nV: Tensor,
    teacher_logits_nV: Tensor,
    tokens_n: Tensor,
    *,
    beta: float,
    temperature: float,
) -> TokenLoss:
    student_token_n = student_logits_nV.gather(1, tokens_n[:, None])[:, 0]
    teacher_token_n = teacher_logits_nV.gather(1, tokens_n[:, None])[:, 0]
    loss_n, gradient_nV, log_q_norm_n, log_p_norm_n, entropy_n = divergence_and_gradient_(
        student_logits_nV, teacher_logits_nV, beta, temperature
    )
    return TokenLoss(
        loss_n,
        gradient_nV,
        student_logprob_n=student_token_n / temperature - log_q_norm_n,
        teacher_logprob_n=teacher_token_n / temperature - log_p_norm_n,
        entropy_n=entropy_n,
    )


def divergence_and_gradient_(
    student_logits_nV: Tensor, teacher_logits_nV: Tensor, beta: float, temperature: float
):
    """Closed form of `generalized_jsd(...).sum(-1)` and of its gradient with respect to the
    student's logits.

    Both inputs are fp32 and are overwritten; the returned gradient lives in `student_logits_nV`.
    Returns `(loss_n, gradient_nV, log_q_norm_n, log_p_norm_n, entropy_n)`: the log-normalisers of
    the tempered logits turn a token's logit into its log-probability; the entropy is the student's,
    in nats. With a = log p, b = log q, k = log(beta/(1-beta)), x = a - b + k and w = softplus(x):

        L     = beta*(sum p(x - w) - k) - (1-beta)*sum q w - log(1-beta)
        dL/dz = (beta-1)/T * q*(w - sum q w)

    Logarithms instead of probabilities keep fp32 gradients within 3e-6 of float64, and softplus
    returns x itself where it is large, so x - w stays exact when the student has almost ruled a
    token out.
    """
    if temperature != 1.0:
        student_logits_nV.div_(temperature)
        teacher_logits_nV.div_(temperature)
    b, e_q, sum_q_n, largest_q_n = _unnormalised_(student_logits_nV)
    a, e_p, sum_p_n, largest_p_n = _unnormalised_(teacher_logits_nV)
    log_sum_q_n, log_sum_p_n = sum_q_n.log(), sum_p_n.log()
    entropy_n = log_sum_q_n - _dot(e_q, b) / sum_q_n
    if beta == 0:
        difference = a.sub_(b).add_((log_sum_q_n - log_sum_p_n)[:, None])
        loss_n = _dot(e_p, difference) / sum_p_n
        gradient = torch.sub(e_q.div_(sum_q_n[:, None]), e_p.div_(sum_p_n[:, None]), out=b)
    elif beta == 1:
        difference = b.sub_(a).add_((log_sum_p_n - log_sum_q_n)[:, None])
        loss_n = _dot(e_q, difference) / sum_q_n
        gradient = difference.sub_(loss_n[:, None]).mul_(e_q).div_(sum_q_n[:, None])
    else:
        k = math.log(beta) - math.log1p(-beta)
        x = a.sub_(b).add_((log_sum_q_n - log_sum_p_n + k)[:, None])
        w = torch.ops.aten.softplus.out(x, 1, 20, out=b)
        q_dot_w_n = _dot(e_q, w) / sum_q_n
        loss_n = (
            beta * (_dot(e_p, x.sub_(w)) / sum_p_n - k) - (1 - beta) * q_dot_w_n - math.log1p(-beta)
        )
        gradient = w.sub_(q_dot_w_n[:, None]).mul_(e_q).mul_(((beta - 1) / sum_q_n)[:, None])
    if temperature != 1.0:
        gradient.div_(temperature)
    return loss_n, gradient, largest_q_n + log_sum_q_n, largest_p_n + log_sum_p_n, entropy_n


def _unnormalised_(logits_nV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(logits - largest, exp of it, its sum, largest)`; the first takes the place of the logits.

    Dividing by the sum is left to the rows' sums and to the gradient, where it costs a pass over
    the tile less. The largest logit goes first: a normaliser of 25, rounded to fp32, would leave
    probabilities that sum to 1 + 2e-6, and the gradient of beta = 1 multiplies that by the
    divergence.
    """
    largest_n = logits_nV.amax(-1)
    log_nV = logits_nV.sub_(largest_n[:, None]).clamp_(min=_IMPOSSIBLE)
    exp_nV = log_nV.exp()
    return log_nV, exp_nV, exp_nV.sum(-1), largest_n


def _dot(x_nV: Tensor, y_nV: Tensor) -> Tensor:
    return torch.linalg.vecdot(x_nV, y_nV)
