"""How an update is made, as the fields say it together: precision, adapters, optimizer, schedule.

`config` is a GKDConfig throughout. Every function raises InputError for the first contradiction.
"""

import difflib
import re
from typing import Any

from gkd_ds.config.fields import GROUPS
from gkd_ds.config.training_fields import LIGER_LOSSES, OPTIMIZERS, SCHEDULES
from gkd_ds.config.values import dtype_name, init_dtypes, whole_steps, wrong
from gkd_ds.runtime.errors import InputError, show


def check_training(config: Any) -> None:
    """All that is here; what is left open follows from the rest."""
    take_revision(config)
    check_init_dtypes(config)
    check_precision(config)
    check_adapters(config)
    check_optimizer(config)
    check_schedule(config)
    check_liger(config)
    if config.torch_compile_backend or config.torch_compile_mode:
        config.torch_compile = True
    if config.torch_compile:
        config.torch_compile_backend = config.torch_compile_backend or "inductor"


def take_revision(config: Any) -> None:
    """`model_revision` is the `revision` of the student's init kwargs (the hub's default: main)."""
    revision = config.model_revision
    given = config.model_init_kwargs or {}
    if revision not in (None, "main", given.get("revision")):
        if "revision" in given:
            raise wrong(
                "model_revision",
                f"is {show(revision)}, but model_init_kwargs has the revision "
                f"{show(given['revision'])}; give one",
            )
        config.model_init_kwargs = {**given, "revision": revision}


def check_precision(config: Any) -> None:
    """bf16 or fp16, or neither. Where both are left open, a student that is to be loaded or
    evaluated in 16 bits is trained in them.
    """
    asked = {
        config.dtype,
        *(dtype_name("", given) for given in init_dtypes(config.model_init_kwargs)),
    }
    if config.bf16 is None and not config.fp16:
        config.fp16 = "float16" in asked
        config.bf16 = True if "bfloat16" in asked or config.bf16_full_eval else None
    if config.bf16 and config.fp16:
        raise InputError(
            "GKDConfig fields 'bf16' and 'fp16' are both true; switch one of them off."
        )
    if config.fp16 and config.use_cpu:
        raise InputError(
            "GKDConfig field 'fp16' does not work with 'use_cpu'; use bf16 or neither."
        )
    if asked & {"bfloat16", "float16"} and not config.bf16 and not config.fp16:
        raise InputError(
            "The student's dtype has 16 bits while GKDConfig fields 'bf16' and 'fp16' are false; "
            "set the one that matches, or remove dtype."
        )
    for name, trained in (("bf16_full_eval", config.bf16), ("fp16_full_eval", config.fp16)):
        if getattr(config, name) and not trained:
            short = name.removesuffix("_full_eval")
            raise wrong(
                name, f"needs training in the same precision; set {short}: true, or remove it"
            )


def check_init_dtypes(config: Any) -> None:
    """`dtype` or `torch_dtype` in either of the init kwargs: one that exists, given once."""
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        given = {dtype_name(name, value) for value in init_dtypes(getattr(config, name))}
        if name == "model_init_kwargs" and config.dtype is not None:
            given.add(config.dtype)
        if len(given) > 1:
            raise wrong(name, f"asks for the dtypes {' and '.join(sorted(given))}; give one")


def check_adapters(config: Any) -> None:
    """Settings of adapters go with `use_peft`."""
    for option in GROUPS["Adapters"]:
        if not config.use_peft and getattr(config, option.name) != option.default:
            raise wrong(option.name, "is set, but use_peft is false; set it to true, or remove it")


def check_optimizer(config: Any) -> None:
    if config.optim not in OPTIMIZERS:
        near = difflib.get_close_matches(config.optim, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(OPTIMIZERS)}."
        raise InputError(f"GKDConfig field 'optim' is {show(config.optim)}; {hint}")
    if config.optim.endswith(("lomo", "_layerwise")):
        raise wrong(
            "optim",
            f"is {config.optim}, which updates weights while gradients are computed, before the "
            "window's are complete; choose another, such as adafactor or adamw_8bit",
        )
    if config.optim.startswith("schedule_free"):
        raise wrong(
            "optim",
            f"is {config.optim}, which evaluates with other weights than it trains, and a rollout "
            "needs both; choose another, and a schedule by lr_scheduler_type",
        )
    if config.optim_target_modules and not config.optim.startswith(("galore", "apollo")):
        raise wrong("optim_target_modules", "is for galore_* and apollo_*; remove it, or set optim")
    for setting in filter(None, (config.optim_args or "").split(",")):
        if not re.fullmatch(r"\s*\w+\s*=[^=]+", setting):
            raise wrong(
                "optim_args",
                f"must be written name=value,name=value, not {show(config.optim_args)}",
            )


def check_schedule(config: Any) -> None:
    if config.max_steps == 0:
        raise wrong(
            "max_steps",
            "must be a positive number of updates, or -1 to let num_train_epochs decide, not 0",
        )
    if config.warmup_steps >= 1:
        config.warmup_steps = whole_steps("warmup_steps", config.warmup_steps)
    if config.lr_scheduler_type not in SCHEDULES:
        raise wrong(
            "lr_scheduler_type",
            f"must be one of {', '.join(SCHEDULES)}, not {show(config.lr_scheduler_type)}",
        )
    config.lr_scheduler_kwargs = config.lr_scheduler_kwargs or {}
    allowed = SCHEDULES[config.lr_scheduler_type]
    for name in config.lr_scheduler_kwargs:
        if name not in allowed:
            raise wrong(
                "lr_scheduler_kwargs",
                f"holds {show(name)}, but the schedule {config.lr_scheduler_type} takes "
                + (f"only {', '.join(allowed)}" if allowed else "no arguments"),
            )


def check_liger(config: Any) -> None:
    chosen = config.liger_kernel_config
    if chosen and not config.use_liger_kernel:
        raise wrong("liger_kernel_config", "is set, but use_liger_kernel is false; set it to true")
    for name, is_on in (chosen or {}).items():
        if not isinstance(is_on, bool):
            raise wrong(
                "liger_kernel_config", f"has {name} {show(is_on)}; it must be true or false"
            )
        if is_on and name in LIGER_LOSSES:
            raise wrong(
                "liger_kernel_config",
                f"switches {name} on, but the loss is ours, and made chunk by chunk already; "
                "remove it",
            )
