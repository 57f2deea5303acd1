"""What is checked of a GKDConfig beyond the type of one field: combinations, and what its paths
name.

`config` is a GKDConfig throughout; its methods `validate`, `validate_files` and
`check_output_dir_is_free` call what is here.
"""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from gkd_ds.config.accelerate_launch import take_launch_settings
from gkd_ds.config.fields import OPTIONS
from gkd_ds.config.paths import (
    check_dataset,
    check_model,
    check_path_or_hub_name,
    obstacle_to_writing,
)
from gkd_ds.config.training_checks import check_training
from gkd_ds.config.values import is_text, whole_steps, wrong
from gkd_ds.runtime.errors import InputError, show
from gkd_ds.runtime.files import check_stop_file

# transformers' reporting integrations.
INTEGRATIONS = """azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow
neptune swanlab tensorboard trackio wandb""".split()

# Fields in which a leading ~ means the user's home.
PATHS = (
    "output_dir",
    "logging_dir",
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
    config.eval_delay = config.eval_delay or 0  # TrainingArguments.set_evaluate makes it None
    if config.include_num_input_tokens_seen is True:
        config.include_num_input_tokens_seen = "all"
    if config.assistant_only_loss:
        config.train_on = "every_turn"
    take_launch_settings(config)
    check_training(config)
    check_speculation(config)
    check_intervals(config)
    check_best(config)
    check_hub(config)
    check_metrics(config)


def check_speculation(config: Any) -> None:
    """Drafts need an engine that can read them, and their settings need drafts."""
    if config.rollout_speculation != "none":
        if config.rollout_engine not in ("auto", "gather"):
            raise wrong(
                "rollout_speculation",
                "needs the whole student on every rank, to read what it wrote before, but "
                f"rollout_engine is {config.rollout_engine}; set that to gather, or this to none",
            )
        return
    for name in ("speculation_share", "speculation_disk_mb"):
        if getattr(config, name) != OPTIONS[name].default:
            raise wrong(name, "is set, but rollout_speculation is none; set that, or remove it")


def check_metrics(config: Any) -> None:
    """What compute_metrics gets."""
    for name in config.include_for_metrics:
        if name not in ("inputs", "loss"):
            raise wrong("include_for_metrics", f"may hold inputs and loss, not {show(name)}")


def check_intervals(config: Any) -> None:
    """Steps that fit their strategies; `eval_steps` is `logging_steps` by default, and evaluations
    while training are evaluations.
    """
    config.do_eval = config.do_eval or config.eval_strategy != "no"
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
            setattr(config, name, whole_steps(name, steps))


def check_best(config: Any) -> None:
    """What choosing the best checkpoint needs; and which of two metrics is better, which callbacks
    ask without it.
    """
    wanted = "load_best_model_at_end" if config.load_best_model_at_end else "save_strategy: best"
    if config.load_best_model_at_end or config.save_strategy == "best":
        check_best_can_be_had(config, wanted)
        config.metric_for_best_model = config.metric_for_best_model or "loss"
    name = config.metric_for_best_model
    if config.greater_is_better is None and name is not None:
        config.greater_is_better = not name.endswith(("loss", "divergence"))


def check_best_can_be_had(config: Any, wanted: str) -> None:
    """Evaluations to choose from, and a whole checkpoint for each. `wanted` is what asks for it."""
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
    """The trackers besides metrics.jsonl: transformers' names, or "all" alone."""
    names = value.split(",") if is_text(value) else value or []
    names = [name.strip() for name in names]
    for name in names:
        if name not in (*INTEGRATIONS, "all", "none"):
            raise wrong(
                "report_to",
                f"must be {', '.join(INTEGRATIONS)}, all or none, not {show(name)}; metrics.jsonl "
                "is always written",
            )
    names = [name for name in dict.fromkeys(names) if name != "none"]
    return ["all"] if "all" in names else names


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
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise wrong(
            "use_liger_kernel",
            "needs the package liger-kernel; install it, or set it to false (the loss is fused "
            "without it)",
        )
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
