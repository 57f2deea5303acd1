"""The optimizer that `optim` names, as transformers makes it, and the schedule of its learning
rate.
"""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import zero
from gkd_ds.runtime.errors import InputError, first_line

# Values of optim_args are numbers, names or switches.
_PROBES = ("0.5", "1", "true")


def decayed_parameters(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that `weight_decay` shrinks: vectors (biases, norms) are left
    out, as in transformers.
    """
    return [name for name, p in model.named_parameters() if len(zero.full_shape(p)) > 1]


def make_optimizer(model: PreTrainedModel, config: GKDConfig, decayed: list[str]) -> Optimizer:
    """What `optim` names, over all trainable parameters of `model`; those named in `decayed` are
    decayed.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = set(decayed)
    groups = [
        {
            "params": [p for name, p in trainable if name in names],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trainable if name not in names], "weight_decay": 0.0},
    ]
    optimizer, settings = optimizer_class(config, model)
    return optimizer(**{"params": [group for group in groups if group["params"]], **settings})


def require_pair(optimizers: tuple[Optimizer | None, LRScheduler | None]) -> None:
    """Raise InputError for a scheduler of the caller's that is not for the caller's optimizer: it
    would have no effect.
    """
    optimizer, scheduler = optimizers
    if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not optimizer:
        raise InputError(
            "the scheduler in optimizers belongs to another optimizer, so it would have no effect; "
            "pass (optimizer, scheduler) with the optimizer that it was made for."
        )


def make_scheduler(optimizer: Optimizer, config: GKDConfig, total_updates: int) -> LRScheduler:
    """The learning rate over `total_updates` updates, by the fields `lr_scheduler_*` and
    `warmup_*`.
    """
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        config.get_warmup_steps(total_updates),
        total_updates,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def optimizer_class(
    config: GKDConfig, model: PreTrainedModel | None = None
) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and keyword arguments; those of a low-rank one hold `params`, too.

    `model` is needed for the low-rank ones (GaLore, Apollo) alone. Raises InputError where a
    package is missing, or optim_args holds what the optimizer does not take.
    """
    found = _ask(config, config.optim_args, model)
    settings = dict(part.split("=") for part in (config.optim_args or "").split(",") if part)
    for name in settings:
        if not _has_effect(config, settings, name, model):
            raise InputError(
                f"GKDConfig field 'optim_args' sets {name.strip()}, which {config.optim} does not "
                "take from there; remove it, or use the field of that name."
            )
    return found


def require_optimizer(config: GKDConfig) -> None:
    """Raise InputError for what can be known to be wrong before there is a model."""
    if not config.optim.startswith(("galore", "apollo")):
        optimizer_class(config)


def _ask(
    config: GKDConfig, optim_args: str | None, model: PreTrainedModel | None
) -> tuple[type, dict[str, Any]]:
    asked = copy.copy(config)
    asked.optim, asked.optim_args = OptimizerNames(config.optim), optim_args
    try:
        return Trainer.get_optimizer_cls_and_kwargs(asked, model)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        reason = first_line(error).split(". ")[0].rstrip(".")
        raise InputError(
            f"GKDConfig field 'optim' is {config.optim}, which cannot be had with optim_args "
            f"{optim_args!r} here ({reason}); install what it needs, or change optim or optim_args."
        ) from error


def _has_effect(
    config: GKDConfig, settings: dict[str, str], name: str, model: PreTrainedModel | None
) -> bool:
    """Whether any value of `name` changes the optimizer: transformers passes over unknown names."""
    if name.strip() == "weight_decay":
        return False  # every group of parameters has its own
    without = _told({key: value for key, value in settings.items() if key != name})
    before = _comparable(_ask(config, without, model))
    for probe in _PROBES:
        try:
            after = _comparable(_ask(config, _told({**settings, name: probe}), model))
        except InputError:
            return True  # it was read, if not understood
        if after != before:
            return True
    return False


def _told(settings: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _comparable(found: tuple[type, dict[str, Any]]) -> tuple:
    cls, settings = found
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in settings.get("params", [])
    ]
    return cls, {**settings, "params": groups}
