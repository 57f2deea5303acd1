"""What is told about a run, and what is kept of it. See option.py for how fields are declared."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gkd_ds.config.option import SECRET, AtLeastOne, Bounds, NotNegative, Read, option
from gkd_ds.config.values import IntervalStrategy, SaveStrategy

LogLevel = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]


@dataclass(kw_only=True)
class Logging:
    """Logging"""

    report_to: list[str] | str | None = option(
        None,
        "Where metrics go besides metrics.jsonl: wandb, tensorboard, any other of transformers' "
        "integrations, all (that are installed), or none.",
    )
    run_name: str | None = option(None, "Name of the run in the trackers.")
    project: str = option(
        "huggingface", "Project in W&B and Trackio (the variable WANDB_PROJECT wins)."
    )
    logging_dir: str | None = option(
        None, "Directory of TensorBoard's files (default <output_dir>/runs)."
    )
    trackio_space_id: str | None = option("trackio", "Space of Trackio on the hub.")
    trackio_bucket_id: str | None = option(None, "Bucket of Trackio on the hub.")
    trackio_static_space_id: Annotated[str | None, Read(bool | str | None)] = option(
        None, "Static Space to which Trackio writes at the end; false for none."
    )
    logging_strategy: IntervalStrategy = option("steps", "When to log: no, steps, epoch.")
    logging_steps: NotNegative = option(
        10, "Log every so many updates; below 1: a share of all updates."
    )
    logging_first_step: bool = option(False, "Log the first update too.")
    logging_nan_inf_filter: bool = option(
        True, "Leave losses that are NaN or infinite out of logged averages."
    )
    log_rollouts: Annotated[int, Bounds(low=0)] = option(
        4, "Sampled completions logged each time, beside the teacher's probability of them."
    )
    log_level: LogLevel = option(
        "passive", "Level of our own log; passive leaves Python's logging as it is."
    )
    log_level_replica: LogLevel = option("warning", "The same on ranks that do not log.")
    log_on_each_node: bool = option(
        True, "Whether log_level is that of each node's first rank, or of the first rank alone."
    )
    disable_tqdm: bool | None = option(
        None, "Plain lines instead of a progress bar; null: a bar on a terminal only."
    )
    include_num_input_tokens_seen: Annotated[
        str | bool, Read(Literal["all", "non_padding", "no"] | bool)
    ] = option(
        False,
        "Tell num_input_tokens_seen with each log: tokens of all sequences learned from so far, "
        "padding included (all) or not (non_padding).",
    )
    include_tokens_per_second: bool = option(False, "Tell train_tokens_per_second at the end.")
    skip_memory_metrics: bool = option(
        True, "False: tell what memory initialization, training and evaluation took."
    )


@dataclass(kw_only=True)
class Evaluation:
    """Evaluation"""

    eval_strategy: IntervalStrategy = option("no", "When to evaluate: no, steps, epoch.")
    eval_steps: Annotated[float | None, Bounds(above=0)] = option(
        None, "Evaluate every so many updates (default logging_steps); below 1: a share."
    )
    eval_delay: Annotated[float | None, Bounds(low=0)] = option(
        0, "Updates or epochs before the first evaluation."
    )
    eval_on_start: bool = option(False, "Evaluate before the first update.")
    per_device_eval_batch_size: Annotated[int, Bounds(low=1)] = option(
        8, "Samples per rank and batch when evaluating."
    )
    eval_on_policy: bool = option(
        True, "Evaluate on the student's own samples as well as on reference completions."
    )
    eval_max_samples: AtLeastOne = option(None, "Evaluate on the first so many samples only.")
    prediction_loss_only: bool = option(
        False, "Evaluations return losses alone, even where compute_metrics is given."
    )
    eval_do_concat_batches: bool = option(
        True, "Give compute_metrics one array over all batches; false: a list of the batches'."
    )
    batch_eval_metrics: bool = option(
        False, "Call compute_metrics after each batch, with compute_result at the last."
    )
    include_for_metrics: list[str] = option(
        list, "What compute_metrics gets beside predictions and labels: inputs, loss (per row)."
    )
    predict_with_generate: bool = option(
        False,
        "compute_metrics gets what the student writes and the references, as token ids, and not "
        "the student's logits on the references.",
    )
    load_best_model_at_end: bool = option(
        False, "End with the best checkpoint instead of the last."
    )
    metric_for_best_model: str | None = option(
        None, "Metric that decides which is best (default loss)."
    )
    greater_is_better: bool | None = option(
        None, "Whether that metric should rise (default: not for a loss or divergence)."
    )


@dataclass(kw_only=True)
class Checkpoints:
    """Checkpoints"""

    save_strategy: SaveStrategy = option(
        "steps", "When to write a checkpoint: no, steps, epoch, best."
    )
    save_steps: NotNegative = option(
        500, "Write a checkpoint every so many updates; below 1: a share of all updates."
    )
    save_total_limit: AtLeastOne = option(
        None, "Checkpoints to keep; older ones are deleted; null keeps all."
    )
    save_only_model: bool = option(
        False,
        "Checkpoints without optimizer and position; they cannot be resumed. A stop writes a whole "
        "one.",
    )
    resume_from_checkpoint: Annotated[str | None, Read(bool | str | None)] = option(
        None,
        "A checkpoint's directory; true: the newest valid one in output_dir; auto: the same, or "
        "start if there is none.",
    )
    save_weights_in_checkpoints: bool | None = option(
        None,
        "Checkpoints also hold the model, so that from_pretrained reads them; null: for students "
        "of less than 2 GB.",
    )
    restore_callback_states_from_checkpoint: bool = option(
        False, "On resume, callbacks that can be exported get the state that they had."
    )


@dataclass(kw_only=True)
class Hub:
    """Hub"""

    push_to_hub: bool = option(False, "Push the model to the hub when it is saved.")
    hub_model_id: str | None = option(
        None, "Repository on the hub (default: the name of output_dir)."
    )
    hub_strategy: Literal["every_save", "end", "checkpoint", "all_checkpoints"] = option(
        "every_save", "What to push, and when."
    )
    hub_token: Annotated[str | None, SECRET] = option(
        None, "Token of the hub (default: the one you logged in with); never written anywhere."
    )
    hub_private_repo: bool | None = option(None, "Make the repository private.")
    hub_revision: str | None = option(None, "Branch to push to.")
    hub_always_push: bool = option(
        False, "Push every save; false: leave out those that find the push before unfinished."
    )
