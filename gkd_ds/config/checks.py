"""What is checked of a GKDConfig beyond the type of one field: bounds, combinations, and what its
paths name.

`config` is a GKDConfig throughout; its methods `validate`, `validate_files` and
`check_output_dir_is_free` call what is here.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

from gkd_ds.config.paths import (
    check_dataset,
    check_model,
    check_path_or_hub_name,
    obstacle_to_writing,
)
from gkd_ds.config.values import is_text, wrong
from gkd_ds.runtime.errors import InputError, show
from gkd_ds.runtime.files import check_stop_file

# The schedules, each with the names that `lr_scheduler_kwargs` may hold for it.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}

# Fields in which a leading ~ means the user's home.
PATHS = (
    "output_dir",
    "stop_file",
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "chat_template_path",
    "deepspeed",
    "teacher_deepspeed",
    "resume_from_checkpoint",
)


# ---- Without files ----


def check_bounds(name: str, value: Any, bounds: dict[str, float]) -> None:
    """Raise InputError unless `value` is None or within `bounds` (see `option` in config.py)."""
    if value is None:
        return
    inside = not bounds or (
        bounds.get("low", -math.inf) <= value <= bounds.get("high", math.inf)
        and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)
    )
    if not inside:
        words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        wanted = " and ".join(f"{words[key]} {bounds[key]}" for key in words if key in bounds)
        raise wrong(name, f"must be {wanted}, not {show(value)}")


def check_combinations(config: Any) -> None:
    """Check what several fields say together, and fill in what follows from the others.

    Raises:
        InputError: the first contradiction.
    """
    for name in PATHS:
        if is_text(getattr(config, name)):
            setattr(config, name, os.path.expanduser(getattr(config, name)))
    if config.output_dir is None:
        config.output_dir = "trainer_output"
    if not config.output_dir.strip():
        raise wrong("output_dir", "is empty; give the run a directory")
    config.report_to = read_report_to(config.report_to)
    config.max_runtime = read_duration("max_runtime", config.max_runtime)
    check_precision(config)
    check_schedule(config)
    check_intervals(config)
    check_best(config)
    check_hub(config)


def check_precision(config: Any) -> None:
    if config.bf16 and config.fp16:
        raise InputError(
            "GKDConfig fields 'bf16' and 'fp16' are both true; switch one of them off."
        )
    if config.fp16 and config.use_cpu:
        raise InputError(
            "GKDConfig field 'fp16' does not work with 'use_cpu'; use bf16 or neither."
        )
    if config.dtype in ("bfloat16", "float16") and (config.bf16 is False and config.fp16 is False):
        raise wrong(
            "dtype",
            f"is {config.dtype} while bf16 and fp16 are false; set the one that matches, or "
            "remove dtype",
        )


def check_schedule(config: Any) -> None:
    if config.max_steps == 0:
        raise wrong(
            "max_steps",
            "must be a positive number of updates, or -1 to let num_train_epochs decide, not 0",
        )
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


def check_intervals(config: Any) -> None:
    """Steps that fit their strategies; `eval_steps` is `logging_steps` by default."""
    if config.eval_strategy == "steps" and config.eval_steps is None:
        config.eval_steps = config.logging_steps
    for what in ("logging", "eval", "save"):
        name, strategy = f"{what}_steps", getattr(config, f"{what}_strategy")
        steps = getattr(config, name)
        if strategy == "steps" and not steps:
            raise wrong(
                name,
                f"must be above 0 when {what}_strategy is steps; set {what}_strategy: no to switch "
                "it off",
            )
        if steps is not None and steps >= 1:
            if steps != int(steps):
                raise wrong(name, f"must be a whole number, or a share below 1, not {show(steps)}")
            setattr(config, name, int(steps))


def check_best(config: Any) -> None:
    """What choosing the best checkpoint needs: evaluations, a checkpoint for each, and a metric."""
    wanted = "load_best_model_at_end" if config.load_best_model_at_end else "save_strategy: best"
    if not config.load_best_model_at_end and config.save_strategy != "best":
        return
    if config.eval_strategy == "no":
        raise InputError(
            f"GKDConfig setting '{wanted}' needs evaluations to choose from; set eval_strategy to "
            "steps or epoch."
        )
    if config.load_best_model_at_end and config.save_only_model:
        raise InputError(
            "GKDConfig field 'load_best_model_at_end' needs whole checkpoints, but "
            "'save_only_model' is true; switch one of them off."
        )
    if config.load_best_model_at_end and config.save_strategy != "best":
        if config.save_strategy != config.eval_strategy:
            raise InputError(
                "GKDConfig field 'load_best_model_at_end' needs a checkpoint for every evaluation; "
                f"set save_strategy to {config.eval_strategy.value}, like eval_strategy."
            )
        if config.eval_strategy == "steps" and not is_multiple(
            config.save_steps, config.eval_steps
        ):
            raise InputError(
                "GKDConfig field 'load_best_model_at_end' needs save_steps to be a multiple of "
                f"eval_steps, but they are {config.save_steps} and {config.eval_steps}."
            )
    if config.metric_for_best_model is None:
        config.metric_for_best_model = "loss"
    if config.greater_is_better is None:
        config.greater_is_better = not config.metric_for_best_model.endswith(("loss", "divergence"))


def check_hub(config: Any) -> None:
    """A push needs a name that the hub takes for a repository."""
    if not config.push_to_hub:
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        whose = "is" if config.hub_model_id else "is not set, and the last part of output_dir is"
        raise wrong(
            "hub_model_id",
            f"{whose} {show(name)}, which the hub does not take for a repository's name; set one "
            "such as org/name",
        ) from None


def read_report_to(value: list | str | None) -> list[str]:
    """The trackers besides metrics.jsonl: [] or ["wandb"]."""
    names = value.split(",") if is_text(value) else value or []
    names = [name.strip() if is_text(name) else name for name in names]
    for name in names:
        if name not in ("wandb", "all", "none"):
            raise wrong(
                "report_to",
                f"must be wandb, all or none, not {show(name)}; metrics.jsonl is always written",
            )
    return ["wandb"] if "wandb" in names or "all" in names else []


def read_duration(name: str, value: float | str | None) -> float | None:
    """Seconds from seconds or from text such as "3h30m", "45m", "1d2h", "90s"; positive."""
    seconds = value
    if is_text(value):
        match = re.fullmatch(
            r"(?=.)(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?",
            value.strip().lower(),
        )
        if not match:
            raise wrong(name, f"must be seconds or a time such as 3h30m, not {show(value)}")
        seconds = float(
            sum(
                int(count or 0) * unit
                for count, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)
            )
        )
    if seconds is not None and seconds <= 0:
        raise wrong(name, f"must be more than no time, not {show(value)}")
    return seconds


def is_multiple(larger: float, smaller: float) -> bool:
    return (
        math.isclose(larger / smaller, round(larger / smaller), rel_tol=1e-9) and larger >= smaller
    )


# ---- In the file system, before any model is loaded ----


def check_files(config: Any) -> None:
    """Check paths, and that output_dir can be written.

    Raises:
        InputError: a file or directory is missing, or cannot be written.
    """
    check_model("model_name_or_path", config.model_name_or_path, config.model_init_kwargs)
    check_model(
        "teacher_model_name_or_path",
        config.teacher_model_name_or_path,
        config.teacher_model_init_kwargs,
    )
    check_dataset("dataset_name", config.dataset_name)
    if config.chat_template_path is not None:
        check_path_or_hub_name(
            "chat_template_path",
            config.chat_template_path,
            "a Jinja file or a tokenizer's directory",
        )
    if isinstance(config.resume_from_checkpoint, str) and config.resume_from_checkpoint != "auto":
        if not Path(config.resume_from_checkpoint).is_dir():
            raise wrong(
                "resume_from_checkpoint",
                f"names {show(config.resume_from_checkpoint)}, which is not a directory; give a "
                "checkpoint-<step> directory, true or auto",
            )
    obstacle = obstacle_to_writing(config.output_dir)
    if obstacle:
        where = f"is {show(config.output_dir)}, where nothing can be written ({obstacle})"
        raise wrong("output_dir", f"{where}; choose another directory")
    check_stop_file(config.stop_path)


def check_output_dir_is_free(config: Any, resume: bool | str | None) -> None:
    """What training would write over: call it before training begins, with the value of
    resume_from_checkpoint that counts. Whoever only evaluates may stand in an old run's
    directory.

    Raises:
        InputError: output_dir is one of the inputs, or holds a run that is neither continued
        nor given up.
    """
    directory = Path(config.output_dir)
    for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        other = getattr(config, name)
        if (
            other is not None
            and os.path.exists(other)
            and directory.exists()
            and os.path.samefile(other, directory)
        ):
            raise wrong(
                "output_dir",
                f"is the same directory as {name}, which the run would overwrite; choose another",
            )
    if config.overwrite_output_dir or resume:
        return
    traces = [
        *directory.glob("checkpoint-*"),
        *directory.glob("metrics.jsonl"),
        *directory.glob("*.safetensors"),
    ]
    if traces:
        raise wrong(
            "output_dir",
            f"is {show(config.output_dir)}, which already holds a run ({traces[0].name}); choose "
            "another directory, or set resume_from_checkpoint: auto to continue it, or "
            "overwrite_output_dir: true to replace it",
        )
