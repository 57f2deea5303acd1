"""The generalized Jensen-Shannon divergence of GKD: the formula, its gradient, and a head that
never holds all logits.

Agarwal et al. 2023 (arXiv 2306.13649), eq. 1, in TRL's orientation: with P the teacher, Q the
student and M = beta*P + (1-beta)*Q,

    L = beta*KL(P||M) + (1-beta)*KL(Q||M)        beta = 0: exactly KL(P||Q)        beta = 1: exactly
    KL(Q||P)

The mixture form itself tends to 0 at both ends (L/beta -> KL(P||Q) as beta -> 0), so the scale of
the loss jumps there.

Shapes: N completion tokens, V shared vocabulary, D student width, E teacher width, n rows of one
chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_ds.engine import accelerator

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


def divergence_and_gradient_(
    student_logits_nV: Tensor, teacher_logits_nV: Tensor, beta: float, temperature: float
):
    """Closed form of `generalized_jsd(...).sum(-1)` and of its gradient with respect to the
    student's logits.

    Both inputs are fp32 and are overwritten; the returned gradient lives in `student_logits_nV`.
    Returns `(loss_n, gradient_nV, log_q_norm_n, log_p_norm_n, entropy_n)`: the log-normalisers of
    the tempered logits turn a token's logit into its log-probability; the entropy is the student's,
    in nats. With a = log p, b = log q, k = log(beta/(1-beta)), x = a - b + k and w = softplus(x):

        L = beta*(sum p(x - w) - k) - (1-beta)*sum q w - log(1-beta),     dL/dz = (beta-1)/T * q*(w
        - sum q w)

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


@dataclass(frozen=True)
class LogitTransform:
    """What some architectures do to the head's output: multiply it (Cohere, Granite), then squash
    it (Gemma 2).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model_config) -> LogitTransform:
        """Read the transform from a transformers config; causal_lm.check_head compares it with the
        model.
        """
        known = model_config.get_text_config().to_dict()
        scale = known.get("logit_scale") or 1.0
        if known.get("logits_scaling"):
            scale /= known["logits_scaling"]
        return cls(scale=scale, softcap=known.get("final_logit_softcapping"))

    def apply_(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def pull_back_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient with respect to the head's raw output, given the transformed `logits` where they
        are needed.
        """
        if self.softcap is not None:
            gradient = gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's output matrix, whole for the duration of one learn phase."""

    weight_VE: Tensor
    bias_V: Tensor | None
    transform: LogitTransform


@dataclass(frozen=True)
class LossInputs:
    """What the student's head needs beside the student's hidden states to become a loss."""

    teacher_hidden_NE: Tensor
    tokens_N: Tensor
    teacher_head: TeacherHead
    vocabulary: int  # V: the leading token ids that both models know; padding rows of either head are left out
    beta: float
    temperature: float
    chunk_bytes: int  # budget for the logits of both models in one chunk


class DivergenceHead(nn.Module):
    """The student's output layer: logits as usual, or, given `loss`, the divergence from the
    teacher.

    It shares the parameters of the layer it replaces (also tied ones). The loss is computed
    *inside* this module's forward because that is where ZeRO-3 has the weight gathered and
    DeepSpeed's backward hooks look.
    """

    def __init__(self, head: nn.Module, transform: LogitTransform):
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.transform = transform

    def forward(self, hidden: Tensor, *, loss: LossInputs | None = None):
        """`hidden [..., D]` -> logits `[..., V]` (untransformed: the model does that), or, for
        `hidden [N, D]` and `loss`, the tuple `(loss_sum, loss_N, student_logprob_N,
        teacher_logprob_N, entropy_N)`: the sum of the divergence over the N tokens (fp32 scalar,
        differentiable) and, detached, per token: the divergence, both models' log-probability of
        the token (at the divergence temperature) and the student's entropy in nats.
        """
        if loss is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedDivergence.apply(hidden, self.weight, self.bias, self.transform, loss)


class _ChunkedDivergence(torch.autograd.Function):
    """Head, divergence and all gradients in one pass over chunks of tokens: four matrix products
    per chunk.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_WD, bias_W, transform: LogitTransform, loss: LossInputs):
        N, vocabulary = hidden_ND.shape[0], loss.vocabulary
        device = hidden_ND.device
        weight_VD = weight_WD[:vocabulary]
        bias_V = None if bias_W is None else bias_W[:vocabulary]
        hidden_grad_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # Accumulated in fp32 whatever the weights are: many small chunks are summed.
        weight_grad_WD = (
            torch.zeros_like(weight_WD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        bias_grad_W = torch.zeros_like(bias_W, dtype=torch.float32) if bias_W is not None else None
        per_token_4N = torch.empty(4, N, dtype=torch.float32, device=device)

        rows = chunk_rows(N, loss.chunk_bytes, vocabulary, hidden_ND.dtype)
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            hidden_nD = hidden_ND[chunk]
            student_nV = transform.apply_(accelerator.logits(hidden_nD, weight_VD, bias_V))
            teacher_hidden_nE = loss.teacher_hidden_NE[chunk].to(device, non_blocking=True)
            head = loss.teacher_head
            teacher_bias_V = None if head.bias_V is None else head.bias_V[:vocabulary]
            teacher_nV = accelerator.logits(
                teacher_hidden_nE, head.weight_VE[:vocabulary], teacher_bias_V
            )
            teacher_nV = head.transform.apply_(teacher_nV)
            gradient_nV = _elementwise(student_nV, teacher_nV, transform, loss, chunk, per_token_4N)
            if hidden_grad_ND is not None:
                torch.mm(gradient_nV, weight_VD, out=hidden_grad_ND[chunk])
            if weight_grad_WD is not None:
                _add_outer_(weight_grad_WD[:vocabulary], gradient_nV, hidden_nD)
            if bias_grad_W is not None:
                bias_grad_W[:vocabulary] += gradient_nV.sum(0, dtype=torch.float32)
            del student_nV, teacher_nV, gradient_nV

        ctx.gradients = hidden_grad_ND, weight_grad_WD, bias_grad_W
        ctx.dtype = weight_WD.dtype
        loss_N, student_logprob_N, teacher_logprob_N, entropy_N = per_token_4N
        outputs = loss_N.sum(), loss_N, student_logprob_N, teacher_logprob_N, entropy_N
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, upstream, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "the chunked divergence keeps one gradient buffer, so backward runs once per "
                "forward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the head's gradient is the largest tensor of the loss and is used once.
        hidden_grad, weight_grad, bias_grad = (
            None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients
        )
        weight_grad, bias_grad = (
            None if g is None else g.to(ctx.dtype) for g in (weight_grad, bias_grad)
        )
        return hidden_grad, weight_grad, bias_grad, None, None


def _elementwise(
    student_nV, teacher_nV, transform: LogitTransform, loss: LossInputs, chunk: slice, per_token_4N
):
    """Divergence of a chunk, tile by tile so that a tile stays in cache; overwrites and returns
    `student_nV`.
    """
    tile_rows = accelerator.elementwise_tile_rows(student_nV)
    for start in range(0, student_nV.shape[0], tile_rows):
        tile = slice(start, start + tile_rows)
        out = slice(chunk.start + start, min(chunk.start + start + tile_rows, chunk.stop))
        student, teacher = student_nV[tile].float(), teacher_nV[tile].float()
        capped_logits = student.clone() if transform.softcap is not None else None
        token_index = loss.tokens_N[out, None]
        student_token, teacher_token = (
            student.gather(1, token_index)[:, 0],
            teacher.gather(1, token_index)[:, 0],
        )
        loss_n, gradient, log_q_norm_n, log_p_norm_n, entropy_n = divergence_and_gradient_(
            student, teacher, loss.beta, loss.temperature
        )
        per_token_4N[0, out] = loss_n
        per_token_4N[1, out] = student_token / loss.temperature - log_q_norm_n
        per_token_4N[2, out] = teacher_token / loss.temperature - log_p_norm_n
        per_token_4N[3, out] = entropy_n
        student_nV[tile] = transform.pull_back_(gradient, capped_logits)
    return student_nV


def _add_outer_(total_VD: Tensor, gradient_nV: Tensor, hidden_nD: Tensor) -> None:
    if hidden_nD.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_nV.t(), hidden_nD)
    else:
        total_VD.add_(gradient_nV.t() @ hidden_nD)


def chunk_rows(tokens: int, chunk_bytes: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows per chunk so that both models' logits fit `chunk_bytes`: a multiple of 16, chunks of
    about equal size.
    """
    most = max(
        16,
        (chunk_bytes - 1)
        // (2 * (vocabulary + accelerator.CPU_ROW_GAP) * dtype.itemsize)
        // 16
        * 16,
    )
    chunks = max(1, math.ceil(tokens / most))
    return math.ceil(tokens / chunks / 16) * 16 or 16
