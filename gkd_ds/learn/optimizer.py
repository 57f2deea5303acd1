"""The student's optimizer and the schedule of its learning rate, from the configuration."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import zero


def decayed_parameters(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that `weight_decay` shrinks: vectors (biases, norms) are left
    out, as in transformers.
    """
    return [name for name, p in model.named_parameters() if len(zero.full_shape(p)) > 1]


def make_optimizer(
    model: PreTrainedModel, config: GKDConfig, decayed: list[str]
) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters of `model`; those named in `decayed` are decayed."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trainable if name in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optim == "adamw_torch_fused",
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: GKDConfig, total_updates: int
) -> LRScheduler:
    """The learning rate over `total_updates` updates, as the configuration's `lr_scheduler_*` and
    `warmup_*` have it.
    """
    warmup = config.warmup_steps or int(-(-total_updates * config.warmup_ratio // 1))
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        warmup,
        total_updates,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
