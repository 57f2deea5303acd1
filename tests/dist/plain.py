"""A window and its update once more, in plain torch: whole logits, one sample at a time, nothing of
gkd_ds's engines.

loss, gradients, update of a list of rollouts as tests.dist.worker wrote them: {"prompt_ids",
"completion_ids"}
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float
) -> Tensor:
    """The generalized JSD of every position, for 0 < beta < 1, written with probabilities in
    float64.
    """
    q, p = (
        logits.double().div(temperature).softmax(-1) for logits in (student_logits, teacher_logits)
    )
    m = beta * p + (1 - beta) * q
    return beta * F.kl_div(m.log(), p, reduction="none").sum(-1) + (1 - beta) * (
        F.kl_div(m.log(), q, reduction="none").sum(-1)
    )


def window_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: list[dict],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Sum of the divergence over all completion tokens / their number. Differentiable in the
    student.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    vocabulary = min(sizes)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        prompt, completion = rollout["prompt_ids"], rollout["completion_ids"]
        ids = torch.tensor([prompt + completion])
        where = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        student_logits = student(input_ids=ids).logits[0, where, :vocabulary]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids).logits[0, where, :vocabulary]
        total = total + divergence(student_logits, teacher_logits, beta, temperature).sum()
        tokens += len(completion)
    return total / max(tokens, 1)


def update_(
    student: PreTrainedModel,
    loss: Tensor,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    epsilon: float,
) -> float:
    """One clipped AdamW update in place, no decay for vectors; returns the gradient's norm before
    clipping.
    """
    loss.backward()
    parameters = list(student.parameters())
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(
        groups, lr=learning_rate, betas=(0.9, 0.999), eps=epsilon, foreach=False
    ).step()
    return float(norm)
