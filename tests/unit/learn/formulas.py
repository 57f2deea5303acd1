"""Definitions that are written another way than the package's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def kl_div_definition(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float
) -> Tensor:
    """TRL's generalized_jsd_loss before masking and reduction, `[..., V]`."""
    log_q = F.log_softmax(student_logits / temperature, -1)
    log_p = F.log_softmax(teacher_logits / temperature, -1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True)
    weight = torch.tensor(beta, dtype=log_q.dtype)
    log_m = torch.logsumexp(
        torch.stack([log_q + torch.log1p(-weight), log_p + torch.log(weight)]), 0
    )
    to_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return weight * to_teacher + (1 - weight) * to_student
