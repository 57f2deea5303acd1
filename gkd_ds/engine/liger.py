"""Liger's kernels in a model's layers."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from gkd_ds.config.training_fields import LIGER_LOSSES
from gkd_ds.runtime.errors import InputError, name_list


def use(model: PreTrainedModel, chosen: dict[str, bool] | None) -> None:
    """Put the kernels that Liger has for this architecture into `model`, but for those of its
    losses.

    `chosen` says which, by Liger's names; default: those that Liger would choose. Raises InputError
    where there are none, or none of a name: Liger itself would pass over both.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    architecture = model.config.model_type
    if architecture not in known:
        raise InputError(
            f"GKDConfig field 'use_liger_kernel' is true, but Liger has no kernels for "
            f"{architecture}; remove it."
        )
    names = inspect.signature(known[architecture]).parameters.keys() - {"model"}
    if unknown := sorted((chosen or {}).keys() - names):
        raise InputError(
            f"GKDConfig field 'liger_kernel_config' names {name_list(unknown)}, which Liger does "
            f"not have for {architecture}; it has {', '.join(sorted(names - LIGER_LOSSES))}."
        )
    apply_liger_kernel(model, {**(chosen or {}), **dict.fromkeys(LIGER_LOSSES & names, False)})
