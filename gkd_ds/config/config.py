"""GKDConfig: every field of a run, its meaning, its default and its bounds.

    from gkd_ds import GKDConfig
    args = GKDConfig(output_dir="runs/first", per_device_train_batch_size=1, lmbda=1.0)

The fields carry the names, meanings and defaults of TRL's GKDConfig, so code and recipes written
for it keep working; our own fields stand beside the ones they belong to. What TRL has and we do not
act on is inherited (unsupported.py), and so is what transformers reads (training_args.py).

Everything knowable without files is checked when the object is made (`validate`); files and
directories by `validate_files`, which the command line and the trainer call before any model is
loaded, and by `check_output_dir_is_free`, before training. All raise InputError. Nothing here
imports torch, so a wrong field answers at once. `python -m gkd_ds.train --help` prints the fields.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from gkd_ds.config import checks
from gkd_ds.config.deepspeed_checks import read_student_file, read_teacher_file
from gkd_ds.config.training_args import ReadAsTrainingArguments
from gkd_ds.config.unsupported import REASONS, UnsupportedFields, refuse_unsupported
from gkd_ds.config.values import IntervalStrategy, SaveStrategy, convert


def option(
    default: Any, help: str, *, heading: str | None = None, secret: bool = False, **bounds: float
) -> Any:
    """A field: its default (`dict` and `list` mean an empty one), its meaning, and inclusive
    (`low`, `high`) or exclusive (`above`, `below`) bounds. `heading` starts a group of fields."""
    metadata = {"help": help, "heading": heading, "secret": secret, "bounds": bounds}
    if default in (dict, list):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass
class GKDConfig(ReadAsTrainingArguments, UnsupportedFields):
    """All fields of a run. See the module docstring; each field's line says what it does.

    Raises:
        InputError: a value of the wrong type or out of bounds, a combination that contradicts
        itself, or a field of TRL's that is not supported and was changed.
    """

    output_dir: str | None = option(
        None,
        "Directory of the run: metrics, checkpoints, final model (default trainer_output).",
        heading="The run",
    )
    overwrite_output_dir: bool = option(
        False, "Start over in an output_dir that already holds a run."
    )
    do_train: bool = option(False, "Accepted for TRL's scripts; calling train() is what trains.")
    do_eval: bool = option(
        False, "Accepted for TRL's scripts; the command line reads the evaluation split if set."
    )
    seed: int = option(
        42, "Seed of the model, of every sampled token and of the source draws.", low=0, below=2**32
    )
    data_seed: int | None = option(
        None, "Seed of the sample order (default: seed).", low=0, below=2**32
    )
    full_determinism: bool = option(False, "Deterministic kernels only (slower on GPUs).")
    max_runtime: float | str | None = option(
        None,
        "Stop with a checkpoint after this time: seconds, or text such as 3h30m; all ranks agree "
        "on it.",
    )
    stop_file: str | None = option(
        None, "Stop with a checkpoint when this file appears (default <output_dir>/STOP)."
    )
    max_bad_updates: int = option(
        5, "Stop with a diagnosis after this many skipped updates in a row.", low=1
    )
    watchdog_timeout: float = option(
        1800.0, "Seconds without progress on any rank before the run is ended.", above=0
    )

    model_name_or_path: str | None = option(
        None, "The student: a local directory or a hub name.", heading="Models"
    )
    teacher_model_name_or_path: str | None = option(
        None, "The teacher: a local directory or a hub name."
    )
    model_init_kwargs: dict | None = option(
        None, "Keyword arguments of the student's from_pretrained."
    )
    teacher_model_init_kwargs: dict | None = option(
        None, "Keyword arguments of the teacher's from_pretrained."
    )
    trust_remote_code: bool = option(False, "Allow models that bring their own Python code.")
    attn_implementation: str | None = option(
        None, "Attention of both models: eager, sdpa, flash_attention_2, ..."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option(
        None,
        "Type of the student's weights; where bf16 and fp16 say another one, theirs counts, and a "
        "warning says so.",
    )
    disable_dropout: bool = option(True, "Switch dropout off in the student.")

    dataset_name: str | None = option(
        None, "A hub name, a JSON, JSONL or Parquet file, or a directory of them.", heading="Data"
    )
    dataset_config: str | None = option(None, "Configuration of the data set on the hub.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    dataset_num_proc: int | None = option(None, "Processes that tokenize.", low=1)
    row_errors: Literal["strict", "skip"] = option(
        "strict", "A malformed row ends the run (strict) or is counted (skip)."
    )
    max_skipped_rows: int = option(
        100, "With row_errors=skip: more malformed rows than this end the run.", low=0
    )
    chat_template_path: str | None = option(
        None, "Chat template: a Jinja file, or a tokenizer's directory or hub name."
    )
    eos_token: str | None = option(None, "End-of-turn token, if not the tokenizer's.")
    pad_token: str | None = option(None, "Padding token, if not the tokenizer's.")
    max_length: int | None = option(
        1024, "Tokens of prompt and completion together; null for no bound.", low=2
    )
    remove_unused_columns: bool = option(
        True, "Accepted for TRL's scripts; only known columns are ever read."
    )
    dataloader_drop_last: bool = option(
        False, "Leave out the last window of an epoch when it is not full."
    )

    lmbda: float = option(
        0.5,
        "Share of on-policy micro-batches: 0 never samples the student, 1 always does.",
        heading="Distillation",
        low=0,
        high=1,
    )
    beta: float = option(
        0.5,
        "L = beta*KL(P|M) + (1-beta)*KL(Q|M) with M = beta*P + (1-beta)*Q, P the teacher, Q the "
        "student; 0 is exactly KL(P|Q) and 1 exactly KL(Q|P), while the mixture tends to 0 at both "
        "ends (L/beta to KL(P|Q), L/(1-beta) to KL(Q|P)): the scale of the loss jumps there.",
        low=0,
        high=1,
    )
    temperature: float = option(0.9, "Temperature of sampling only; 0 decodes greedily.", low=0)
    divergence_temperature: float = option(
        1.0, "Temperature of both distributions in the divergence.", above=0
    )
    max_new_tokens: int = option(128, "Longest sampled completion, in tokens.", low=1)
    seq_kd: bool = option(
        False,
        "Micro-batches that are not on-policy use completions generated by the teacher: one pass "
        "over its weights per token of the longest, beside the one that scores the window.",
    )
    rollout_engine: Literal["auto", "hybrid", "gather", "sharded"] = option(
        "auto",
        "How the student samples: DeepSpeed's hybrid engine, gathered once per window, or "
        "partitioned throughout.",
    )

    per_device_train_batch_size: int = option(
        8, "Samples per rank and micro-batch.", heading="Batches and length", low=1
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches per window, that is, per update.", low=1
    )
    num_train_epochs: float = option(3.0, "Passes over the data.", above=0)
    max_steps: int = option(-1, "Updates; if positive, num_train_epochs does not count.", low=-1)

    learning_rate: float = option(2e-5, "Peak learning rate.", heading="Optimizer", low=0)
    weight_decay: float = option(
        0.0, "Decoupled weight decay; biases and norms are left out.", low=0
    )
    adam_beta1: float = option(0.9, "Decay of Adam's first moment.", low=0, below=1)
    adam_beta2: float = option(0.999, "Decay of Adam's second moment.", low=0, below=1)
    adam_epsilon: float = option(1e-8, "Adam's epsilon.", above=0)
    max_grad_norm: float = option(
        1.0, "Norm to which gradients are clipped; 0 for no clipping.", low=0
    )
    optim: Literal["adamw_torch_fused", "adamw_torch"] = option(
        "adamw_torch_fused", "Optimizer: AdamW, fused or not."
    )
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: " + ", ".join(checks.SCHEDULES) + "."
    )
    lr_scheduler_kwargs: dict | None = option(
        dict, "Arguments of the schedule, such as num_cycles or min_lr."
    )
    warmup_ratio: float = option(
        0.0, "Share of the updates over which the learning rate rises from 0.", low=0, high=1
    )
    warmup_steps: int = option(
        0,
        "Updates over which the learning rate rises from 0; if positive, warmup_ratio does not "
        "count.",
        low=0,
    )

    bf16: bool | None = option(
        None,
        "bfloat16 training; null: where the accelerator is a GPU that supports it, else fp32.",
        heading="Precision and memory",
    )
    fp16: bool = option(False, "float16 training with loss scaling.")
    tf32: bool | None = option(None, "TF32 products on GPUs; null keeps torch's setting.")
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the learn phase (never while sampling)."
    )
    gradient_checkpointing_kwargs: dict | None = option(
        None, "Arguments of gradient checkpointing."
    )
    rollout_memory_mb: int | None = option(
        None,
        "MiB of one rank's KV cache; the window is sampled in as many batches as that takes; null: "
        "in one.",
        low=1,
    )
    offload_optimizer_states: bool = option(
        False,
        "Keep the student's optimizer states in host memory during rollouts, which then have their "
        "room.",
    )
    score_memory_mb: int = option(1024, "MiB of activations inside a layer of the teacher.", low=1)
    targets_memory_mb: int = option(
        4096,
        "MiB of the teacher's hidden states kept on the device; beyond it they go to the host.",
        low=0,
    )
    loss_memory_mb: int = option(
        64, "MiB of the logits chunk in the loss, both models together.", low=1
    )
    learn_tokens_per_micro_batch: int | None = option(
        None,
        "Tokens per forward of the learn phase; null: as many as the widest micro-batch would "
        "hold.",
        low=1,
    )

    deepspeed: dict | str | None = option(
        None,
        "The student's DeepSpeed file or a dict; null: built-in ZeRO-3.",
        heading="DeepSpeed and processes",
    )
    teacher_deepspeed: dict | str | None = option(
        None, "The teacher's DeepSpeed file or a dict; null: built-in resident ZeRO-3."
    )
    deepspeed_log_level: Literal["debug", "info", "warning", "error", "critical"] = option(
        "error", "How much of DeepSpeed's own log to show."
    )
    use_cpu: bool = option(False, "Run on the CPU even where there is an accelerator.")
    local_rank: int = option(-1, "Rank on this node, given by the launcher.", low=-1)
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl", "xccl", "cncl", "mccl"] | None = (
        option(None, "Backend of torch.distributed; null: the accelerator's.")
    )
    ddp_timeout: int = option(1800, "Seconds after which a collective gives up.", low=1)

    report_to: list | str | None = option(
        None, "Where metrics go besides metrics.jsonl: wandb, or none.", heading="Logging"
    )
    run_name: str | None = option(None, "Name of the run on W&B.")
    project: str = option("huggingface", "W&B project (the variable WANDB_PROJECT wins).")
    logging_strategy: IntervalStrategy = option("steps", "When to log: no, steps, epoch.")
    logging_steps: float = option(
        10, "Log every so many updates; below 1: a share of all updates.", low=0
    )
    logging_first_step: bool = option(False, "Log the first update too.")
    logging_nan_inf_filter: bool = option(
        True, "Leave losses that are NaN or infinite out of logged averages."
    )
    log_rollouts: int = option(
        4, "Sampled completions logged each time, beside the teacher's probability of them.", low=0
    )
    log_level: Literal["passive", "detail", "debug", "info", "warning", "error", "critical"] = (
        option("passive", "Level of our own log; passive leaves Python's logging as it is.")
    )
    disable_tqdm: bool | None = option(
        None, "Plain lines instead of a progress bar; null: a bar on a terminal only."
    )

    eval_strategy: IntervalStrategy = option(
        "no", "When to evaluate: no, steps, epoch.", heading="Evaluation"
    )
    eval_steps: float | None = option(
        None, "Evaluate every so many updates (default logging_steps); below 1: a share.", above=0
    )
    eval_delay: float = option(0, "Updates or epochs before the first evaluation.", low=0)
    eval_on_start: bool = option(False, "Evaluate before the first update.")
    per_device_eval_batch_size: int = option(
        8, "Samples per rank and batch when evaluating.", low=1
    )
    eval_on_policy: bool = option(
        True, "Evaluate on the student's own samples as well as on reference completions."
    )
    eval_max_samples: int | None = option(
        None, "Evaluate on the first so many samples only.", low=1
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
    prediction_loss_only: bool = option(
        False, "Accepted for TRL's scripts; evaluation only ever returns losses."
    )

    save_strategy: SaveStrategy = option(
        "steps", "When to write a checkpoint: no, steps, epoch, best.", heading="Checkpoints"
    )
    save_steps: float = option(
        500, "Write a checkpoint every so many updates; below 1: a share of all updates.", low=0
    )
    save_total_limit: int | None = option(
        None, "Checkpoints to keep; older ones are deleted; null keeps all.", low=1
    )
    save_only_model: bool = option(
        False,
        "Checkpoints without optimizer and position; they cannot be resumed. A stop writes a whole "
        "one.",
    )
    resume_from_checkpoint: bool | str | None = option(
        None,
        "A checkpoint's directory; true: the newest valid one in output_dir; auto: the same, or "
        "start if there is none.",
    )

    push_to_hub: bool = option(False, "Push the model to the hub when it is saved.", heading="Hub")
    hub_model_id: str | None = option(
        None, "Repository on the hub (default: the name of output_dir)."
    )
    hub_strategy: Literal["every_save", "end", "checkpoint", "all_checkpoints"] = option(
        "every_save", "What to push, and when."
    )
    hub_token: str | None = option(
        None,
        "Token of the hub (default: the one you logged in with); never written anywhere.",
        secret=True,
    )
    hub_private_repo: bool | None = option(None, "Make the repository private.")
    hub_revision: str | None = option(None, "Branch to push to.")

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Convert text to the fields' types and check types, bounds and combinations. Safe to call
        again.

        Raises:
            InputError: the first thing that is wrong, by field name.
        """
        for field in dataclasses.fields(self):
            value = convert(field.name, field.type, getattr(self, field.name))
            checks.check_bounds(field.name, value, field.metadata["bounds"])
            setattr(self, field.name, value)
        refuse_unsupported(self)
        checks.check_combinations(self)

    def validate_files(self) -> None:
        """Check paths and DeepSpeed files, and that output_dir can be written.

        Raises:
            InputError: a file or directory is missing, malformed, contradicts a field, or cannot be
            written.
        """
        self.read_deepspeed_files()
        checks.check_files(self)

    def read_deepspeed_files(self) -> tuple[dict | None, dict | None]:
        """The student's and the teacher's DeepSpeed configuration, read and checked; None if not
        given.
        """
        return read_student_file(self), read_teacher_file(self)

    def check_output_dir_is_free(self, resume: bool | str | None) -> None:
        """Raise InputError where training would write over something; see checks.py."""
        checks.check_output_dir_is_free(self, resume)

    @property
    def stop_path(self) -> str:
        """The file whose appearance stops the run."""
        return self.stop_file or os.path.join(self.output_dir, "STOP")


def groups() -> dict[str, list[dataclasses.Field]]:
    """The fields that act, in their order, under the heading of their group."""
    grouped: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(GKDConfig):
        if field.metadata["heading"]:
            group = grouped.setdefault(field.metadata["heading"], [])
        if field.name not in REASONS:
            group.append(field)
    return grouped
