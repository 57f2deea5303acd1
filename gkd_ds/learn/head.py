"""The student's output layer, which turns hidden states into a loss without ever holding all
logits.

Shapes: N completion tokens, V shared vocabulary, W rows of the student's output matrix (W >= V), D
student width, E teacher width, n tokens of one chunk or tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_ds.engine import accelerator
from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.learn.objective import Objective
from gkd_ds.records import TargetForm


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's output matrix, whole for the duration of one learn phase."""

    weight_VE: Tensor
    bias_V: Tensor | None
    transform: LogitTransform


@dataclass(frozen=True)
class LossInputs:
    """What the student's head needs beside the student's hidden states to become a loss."""

    targets_NE: Tensor  # the teacher's, of the N tokens, in `form`
    form: TargetForm
    teacher_head: TeacherHead
    tokens_N: Tensor
    vocabulary: int  # V: the leading token ids that both models know; what follows is padding
    objective: Objective
    chunk_bytes: int  # budget for the logits of both models in one chunk

    def teacher_logits(self, chunk: slice, device: torch.device) -> Tensor:
        """The teacher's logits `[n, V]` of some of the tokens."""
        assert self.form is TargetForm.HIDDEN_STATES, self.form
        head = self.teacher_head
        hidden_nE = self.targets_NE[chunk].to(device, non_blocking=True)
        bias_V = None if head.bias_V is None else head.bias_V[: self.vocabulary]
        logits_nV = accelerator.logits(hidden_nE, head.weight_VE[: self.vocabulary], bias_V)
        return head.transform.apply_(logits_nV)


class LossHead(nn.Module):
    """The student's output layer: logits as usual, or, given `loss`, the loss of the
    objective.

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
        teacher_logprob_N, entropy_N)`: the sum of the loss over the N tokens (fp32 scalar,
        differentiable) and, detached, per token: the loss, both models' log-probability of the
        token (at the temperature of the objective) and the student's entropy in nats.
        """
        if loss is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedLoss.apply(hidden, self.weight, self.bias, self.transform, loss)


class _ChunkedLoss(torch.autograd.Function):
    """Head, objective and all gradients in one pass over chunks of tokens: four matrix products per
    chunk.
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

        size = chunk_rows(N, loss.chunk_bytes, vocabulary, hidden_ND.dtype)
        for start in range(0, N, size):
            chunk = slice(start, min(start + size, N))
            hidden_nD = hidden_ND[chunk]
            student_nV = transform.apply_(accelerator.logits(hidden_nD, weight_VD, bias_V))
            teacher_nV = loss.teacher_logits(chunk, device)
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
                "the chunked loss keeps one gradient buffer, so backward runs once per forward"
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
    student_nV: Tensor,
    teacher_nV: Tensor,
    transform: LogitTransform,
    loss: LossInputs,
    chunk: slice,
    per_token_4N: Tensor,
) -> Tensor:
    """The objective on a chunk, tile by tile so that a tile stays in cache. Overwrites and returns
    `student_nV`, which then holds the gradient.
    """
    tile_rows = accelerator.elementwise_tile_rows(student_nV)
    for start in range(0, student_nV.shape[0], tile_rows):
        tile = slice(start, start + tile_rows)
        out = slice(chunk.start + start, min(chunk.start + start + tile_rows, chunk.stop))
        student, teacher = student_nV[tile].float(), teacher_nV[tile].float()
        capped_logits = student.clone() if transform.softcap is not None else None
        of_tile = loss.objective(student, teacher, loss.tokens_N[out])
        per_token_4N[0, out] = of_tile.loss_n
        per_token_4N[1, out] = of_tile.student_logprob_n
        per_token_4N[2, out] = of_tile.teacher_logprob_n
        per_token_4N[3, out] = of_tile.entropy_n
        student_nV[tile] = transform.pull_back_(of_tile.gradient_nV, capped_logits)
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
    bytes_per_row = 2 * (vocabulary + accelerator.CPU_ROW_GAP) * dtype.itemsize
    most = max(16, (chunk_bytes - 1) // bytes_per_row // 16 * 16)
    chunks = max(1, math.ceil(tokens / most))
    return math.ceil(tokens / chunks / 16) * 16 or 16
