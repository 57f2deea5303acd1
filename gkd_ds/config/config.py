"""GKDConfig: every field of a run, its meaning, its default and its bounds.

    from gkd_ds import GKDConfig
    args = GKDConfig(output_dir="runs/first", per_device_train_batch_size=1, lmbda=1.0)

The fields carry the names, meanings and defaults of TRL's GKDConfig, so code and recipes written
for it keep working; our own fields stand beside the ones they belong to. What TRL has and we do not
act on exists too, with its default, and is refused *by name* through the table NOT_SUPPORTED when
it is set to anything else: to support a field, act on it and delete its name there.

Everything knowable without files is checked when the object is made (`validate`); files and
directories by `validate_files`, which the command line and the trainer call before any model is
loaded, and by `check_output_dir_is_free`, before training. All raise InputError. Nothing here
imports torch, so a wrong field answers at once. `python -m gkd_ds.train --help` prints the fields.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from gkd_ds.config.deepspeed import check_student_file, check_teacher_file, read_deepspeed
from gkd_ds.config.paths import (
    check_dataset,
    check_model,
    check_path_or_hub_name,
    check_stop_file,
    obstacle_to_writing,
)
from gkd_ds.config.values import convert, is_text, show, wrong
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.redaction import OPEN_KEYS, SECRET_KEYS, redact


# Equal to transformers' enums of the same names (both are text), which cost an import of torch.
class IntervalStrategy(str, Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class SaveStrategy(str, Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


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

# What TRL's configuration has and this project does not act on (yet): by the reason, which says
# what to do.
NOT_SUPPORTED: dict[str, str] = {
    name: reason
    for reason, names in {
        "there is no prediction loop; use GKDTrainer.evaluate": "do_predict",
        "it is an old name; use per_device_train_batch_size": "per_gpu_train_batch_size",
        "it is an old name; use per_device_eval_batch_size": "per_gpu_eval_batch_size",
        "it is an old name; use hub_model_id": "push_to_hub_model_id",
        "it is an old name; put the organization into hub_model_id": "push_to_hub_organization",
        "it is an old name; use hub_token": "push_to_hub_token",
        "it is an old name; use use_cpu": "no_cuda",
        "DeepSpeed has no engine for MPS": "use_mps_device",
        "DeepSpeed has no engine for TPUs": "tpu_num_cores tpu_metrics_debug",
        "evaluation keeps sums, not predictions": (
            "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
            "include_inputs_for_metrics include_for_metrics"
        ),
        "labels are always the completion tokens": "label_names",
        "there is only one evaluation loop": "use_legacy_prediction_loop",
        "the models have no past to carry between batches": "past_index",
        "evaluation uses the precision of training; set bf16": "bf16_full_eval",
        "evaluation uses the precision of training; set fp16": "fp16_full_eval",
        "apex is not used; set fp16 or bf16": "fp16_opt_level fp16_backend half_precision_backend",
        "evaluation runs the ZeRO engines, which cannot be traced": "jit_mode_eval",
        "use max_bad_updates, which stops a run with a diagnosis": "debug",
        "memory is bounded by rollout_memory_mb, score_memory_mb and loss_memory_mb": (
            "torch_empty_cache_steps auto_find_batch_size"
        ),
        "only the first rank logs; use log_level": "log_level_replica",
        "only the first rank logs": "log_on_each_node",
        "models are always written as safetensors": "save_safetensors",
        "checkpoints need a directory that all nodes share": "save_on_each_node",
        "the data set is tokenized once, before training, and needs no loader processes": (
            "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers dataloader_pin_memory"
        ),
        "the learn phase already packs a window's samples by length": "group_by_length length_column_name",
        "DeepSpeed ZeRO-3 shards the student": (
            "fsdp fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"
        ),
        "DeepSpeed ZeRO-3 shards the student; use deepspeed": "fsdp_config",
        "the engines are DeepSpeed's own, without accelerate": "accelerator_config parallelism_config",
        "it belongs to SageMaker": "mp_parameters",
        "gradients are reduced by DeepSpeed; use its file": (
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"
        ),
        "the teacher's whole distribution is the target": "label_smoothing_factor",
        "noise in the embeddings would make the student differ from the one that sampled": (
            "neftune_noise_alpha"
        ),
        "AdamW takes its values from learning_rate, weight_decay and adam_*": "optim_args",
        "only AdamW is available": "optim_target_modules adafactor",
        "metrics go to metrics.jsonl and, with report_to: wandb, to W&B": "trackio_space_id",
        "a push always waits for the one before it": "hub_always_push",
        "ZeRO-3 moves parameters in hooks, which compilation would break": (
            "torchdynamo torch_compile torch_compile_backend torch_compile_mode"
        ),
        "there is no hyperparameter search inside a run; see launch/ for sweeps": "ray_scope",
        "perf/rollout_tokens_per_s is always in metrics.jsonl": "include_tokens_per_second",
        "the loss is already computed chunk by chunk; see loss_memory_mb": (
            "use_liger_kernel liger_kernel_config"
        ),
        "rows are always read as chat messages or prompt/completion": "dataset_kwargs dataset_text_field",
        "the learn phase packs a window's samples itself; see learn_tokens_per_micro_batch": (
            "packing packing_strategy eval_packing padding_free"
        ),
        "every completion token of a window weighs the same, on whatever rank": "average_tokens_across_devices",
        "the loss is always on the completion only": "completion_only_loss",
        "the loss is always on the last assistant turn only": "assistant_only_loss",
        "the loss is always the generalized JSD; see beta": "loss_type",
        "use gradient_checkpointing, or DeepSpeed's activation_checkpointing block": (
            "activation_offloading"
        ),
        "sequences of similar length are padded together, to the longest": "pad_to_multiple_of",
        "W&B's files go to output_dir; set WANDB_DIR for another place": "logging_dir",
        "completion tokens are always counted, in metrics.jsonl": "include_num_input_tokens_seen",
        "python -m gkd_ds.train --dry_run estimates memory": "skip_memory_metrics",
        "callbacks start anew": "restore_callback_states_from_checkpoint",
        "a position in the data is a function of the step, so nothing is skipped over": "ignore_data_skip",
    }.items()
    for name in names.split()
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


def option(
    default: Any, help: str, *, heading: str | None = None, secret: bool = False, **bounds: float
) -> Any:
    """A field: its default (`dict` and `list` mean an empty one), its meaning, and inclusive
    (`low`, `high`) or exclusive (`above`, `below`) bounds. `heading` starts a group of fields.
    """
    metadata = {"help": help, "heading": heading, "secret": secret, "bounds": bounds}
    if default in (dict, list):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass
class GKDConfig:
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
        "Stop with a checkpoint after this time: seconds, or text such as 3h30m; all ranks agree on it.",
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
        None, "Type of the student's weights (default: float32 unless bf16 or fp16)."
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
    pad_to_multiple_of: int | None = option(None, "Pad sequences to a multiple of this.", low=1)
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
        "L = beta*KL(P|M) + (1-beta)*KL(Q|M) with M = beta*P + (1-beta)*Q, P the teacher, Q the student; 0 is "
        "exactly KL(P|Q) and 1 exactly KL(Q|P), while the mixture tends to 0 at both ends (L/beta to KL(P|Q), "
        "L/(1-beta) to KL(Q|P)): the scale of the loss jumps there.",
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
        "Micro-batches that are not on-policy use completions generated by the teacher: "
        "one pass over its weights per token of the longest, beside the one that scores the window.",
    )
    rollout_engine: Literal["auto", "hybrid", "gather", "sharded"] = option(
        "auto",
        "How the student samples: DeepSpeed's hybrid engine, gathered once per window, or partitioned throughout.",
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
        "linear", "Schedule of the learning rate: " + ", ".join(SCHEDULES) + "."
    )
    lr_scheduler_kwargs: dict | None = option(
        dict, "Arguments of the schedule, such as num_cycles or min_lr."
    )
    warmup_ratio: float = option(
        0.0, "Share of the updates over which the learning rate rises from 0.", low=0, high=1
    )
    warmup_steps: int = option(
        0,
        "Updates over which the learning rate rises from 0; if positive, warmup_ratio does not count.",
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
        "MiB of one rank's KV cache; the window is sampled in as many batches as that takes; null: in one.",
        low=1,
    )
    offload_optimizer_states: bool = option(
        False,
        "Keep the student's optimizer states in host memory during rollouts, which then have their room.",
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
        "Tokens per forward of the learn phase; null: as many as the widest micro-batch would hold.",
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
    logging_dir: str | None = option(None, "Directory of W&B's local files (default output_dir).")
    log_level: Literal["passive", "detail", "debug", "info", "warning", "error", "critical"] = (
        option("passive", "Level of our own log; passive leaves Python's logging as it is.")
    )
    disable_tqdm: bool | None = option(
        None, "Plain lines instead of a progress bar; null: a bar on a terminal only."
    )
    include_num_input_tokens_seen: bool | str = option(
        False, "Count input tokens: all, non_padding, no."
    )
    skip_memory_metrics: bool = option(True, "Leave memory figures out of the metrics.")

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
        "Checkpoints without optimizer and position; they cannot be resumed. A stop writes a whole one.",
    )
    resume_from_checkpoint: bool | str | None = option(
        None,
        "A checkpoint's directory; true: the newest valid one in output_dir; auto: the same, or start if "
        "there is none.",
    )
    restore_callback_states_from_checkpoint: bool = option(
        False, "Restore the state of callbacks on resume."
    )
    ignore_data_skip: bool = option(
        False, "On resume start at the beginning of the data instead of where it stopped."
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

    do_predict: bool = option(False, "Run a prediction loop.", heading="Of TRL's, not supported")
    per_gpu_train_batch_size: int | None = option(None, "Old name of per_device_train_batch_size.")
    per_gpu_eval_batch_size: int | None = option(None, "Old name of per_device_eval_batch_size.")
    push_to_hub_model_id: str | None = option(None, "Old name of hub_model_id.")
    push_to_hub_organization: str | None = option(None, "Old: organization of the repository.")
    push_to_hub_token: str | None = option(None, "Old name of hub_token.", secret=True)
    no_cuda: bool = option(False, "Old name of use_cpu.")
    use_mps_device: bool = option(False, "Run on Apple's MPS.")
    tpu_num_cores: int | None = option(None, "TPU cores.")
    tpu_metrics_debug: bool = option(False, "Debug TPU metrics.")
    eval_accumulation_steps: int | None = option(None, "Batches of predictions kept on the device.")
    eval_do_concat_batches: bool = option(True, "Concatenate predictions.")
    eval_use_gather_object: bool = option(False, "Gather predictions as objects.")
    batch_eval_metrics: bool = option(False, "Call compute_metrics batch by batch.")
    include_inputs_for_metrics: bool = option(False, "Give the inputs to compute_metrics.")
    include_for_metrics: list = option(list, "What to give to compute_metrics.")
    label_names: list | None = option(None, "Columns with labels.")
    use_legacy_prediction_loop: bool = option(False, "Use the old evaluation loop.")
    past_index: int = option(-1, "Output that carries a past.")
    bf16_full_eval: bool = option(False, "Evaluate entirely in bfloat16.")
    fp16_full_eval: bool = option(False, "Evaluate entirely in float16.")
    fp16_opt_level: str = option("O1", "Level of apex.")
    fp16_backend: str = option("auto", "Old name of half_precision_backend.")
    half_precision_backend: str = option("auto", "Library for mixed precision.")
    jit_mode_eval: bool = option(False, "Evaluate a traced model.")
    debug: list | str = option("", "Debugging aids.")
    torch_empty_cache_steps: int | None = option(None, "Empty torch's cache every so many steps.")
    auto_find_batch_size: bool = option(False, "Search for a batch size that fits.")
    log_level_replica: str = option("warning", "Level of the log of other ranks.")
    log_on_each_node: bool = option(True, "Log on the first rank of every node.")
    save_safetensors: bool = option(True, "Write models as safetensors.")
    save_on_each_node: bool = option(False, "Write checkpoints on every node.")
    dataloader_num_workers: int = option(0, "Processes that load data.")
    dataloader_prefetch_factor: int | None = option(None, "Batches loaded ahead by each process.")
    dataloader_persistent_workers: bool = option(
        False, "Keep the loading processes between epochs."
    )
    dataloader_pin_memory: bool = option(True, "Load into pinned memory.")
    group_by_length: bool = option(False, "Draw batches of similar lengths.")
    length_column_name: str = option("length", "Column with lengths computed before.")
    fsdp: list | str | None = option(None, "Shard with FSDP.")
    fsdp_min_num_params: int = option(0, "FSDP's smallest shard.")
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, "FSDP's layer class.")
    fsdp_config: dict | str | None = option(None, "FSDP's configuration.")
    accelerator_config: dict | str | None = option(None, "accelerate's configuration.")
    parallelism_config: dict | None = option(None, "accelerate's parallelism.")
    mp_parameters: str = option("", "SageMaker's model parallelism.")
    ddp_find_unused_parameters: bool | None = option(None, "DDP: look for unused parameters.")
    ddp_bucket_cap_mb: int | None = option(None, "DDP: bucket size.")
    ddp_broadcast_buffers: bool | None = option(None, "DDP: broadcast buffers.")
    label_smoothing_factor: float = option(0.0, "Label smoothing.")
    neftune_noise_alpha: float | None = option(None, "Noise in the embeddings.")
    optim_args: str | None = option(None, "Arguments of other optimizers.")
    optim_target_modules: str | list | None = option(
        None, "Modules that other optimizers treat specially."
    )
    adafactor: bool = option(False, "Use Adafactor.")
    trackio_space_id: str | None = option("trackio", "Space of Trackio.")
    hub_always_push: bool = option(False, "Push even when the last push has not finished.")
    torchdynamo: str | None = option(None, "Old name of torch_compile_backend.")
    torch_compile: bool = option(False, "Compile the model.")
    torch_compile_backend: str | None = option(None, "Backend of compilation.")
    torch_compile_mode: str | None = option(None, "Mode of compilation.")
    ray_scope: str | None = option("last", "Scope of Ray's hyperparameter search.")
    include_tokens_per_second: bool = option(False, "Log tokens per second.")
    use_liger_kernel: bool = option(False, "Use Liger's kernels.")
    liger_kernel_config: dict | None = option(None, "Which of Liger's kernels.")
    average_tokens_across_devices: bool = option(
        True, "Divide the loss by the tokens of all ranks together."
    )
    dataset_text_field: str = option("text", "Column with plain text.")
    dataset_kwargs: dict | None = option(None, "Further arguments for preparing the data set.")
    packing: bool = option(False, "Pack several samples into one sequence.")
    packing_strategy: str = option("bfd", "How to pack.")
    eval_packing: bool | None = option(None, "Pack when evaluating.")
    padding_free: bool = option(False, "Flatten batches instead of padding them.")
    completion_only_loss: bool | None = option(None, "Loss on the completion only.")
    assistant_only_loss: bool = option(False, "Loss on the assistant's turns only.")
    loss_type: str = option("nll", "Loss of TRL's supervised trainer.")
    activation_offloading: bool = option(False, "Move activations to the host.")

    def __post_init__(self) -> None:
        self.validate()

    # ---- What is checked without files ----

    def validate(self) -> None:
        """Convert text to the fields' types and check types, bounds and combinations. Safe to call
        again.

        Raises:
            InputError: the first thing that is wrong, by field name.
        """
        for field in dataclasses.fields(self):
            value = convert(field.name, field.type, getattr(self, field.name))
            check_bounds(field.name, value, field.metadata["bounds"])
            check_supported(field, value)
            setattr(self, field.name, value)
        for name in PATHS:
            if is_text(getattr(self, name)):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.output_dir is None:
            self.output_dir = "trainer_output"
        if not self.output_dir.strip():
            raise wrong("output_dir", "is empty; give the run a directory")
        self.report_to = read_report_to(self.report_to)
        self.max_runtime = read_duration("max_runtime", self.max_runtime)
        self._check_learning()
        self._check_intervals()
        self._check_best()

    def _check_learning(self) -> None:
        if self.max_steps == 0:
            raise wrong(
                "max_steps",
                "must be a positive number of updates, or -1 to let num_train_epochs decide, not 0",
            )
        if self.bf16 and self.fp16:
            raise InputError(
                "GKDConfig fields 'bf16' and 'fp16' are both true; switch one of them off."
            )
        if self.fp16 and self.use_cpu:
            raise InputError(
                "GKDConfig field 'fp16' does not work with 'use_cpu'; use bf16 or neither."
            )
        if self.dtype in ("bfloat16", "float16") and (self.bf16 is False and self.fp16 is False):
            raise wrong(
                "dtype",
                f"is {self.dtype} while bf16 and fp16 are false; set the one that matches, or remove dtype",
            )
        if self.lr_scheduler_type not in SCHEDULES:
            raise wrong(
                "lr_scheduler_type",
                f"must be one of {', '.join(SCHEDULES)}, not {show(self.lr_scheduler_type)}",
            )
        self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {}
        allowed = SCHEDULES[self.lr_scheduler_type]
        for name in self.lr_scheduler_kwargs:
            if name not in allowed:
                raise wrong(
                    "lr_scheduler_kwargs",
                    f"holds {show(name)}, but the schedule {self.lr_scheduler_type} takes "
                    + (f"only {', '.join(allowed)}" if allowed else "no arguments"),
                )

    def _check_intervals(self) -> None:
        if self.eval_strategy == IntervalStrategy.STEPS and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        for what in ("logging", "eval", "save"):
            name, strategy = f"{what}_steps", getattr(self, f"{what}_strategy")
            steps = getattr(self, name)
            if strategy == "steps" and not steps:
                raise wrong(
                    name,
                    f"must be above 0 when {what}_strategy is steps; set {what}_strategy: no to switch it off",
                )
            if steps is not None and steps >= 1:
                if steps != int(steps):
                    raise wrong(
                        name, f"must be a whole number, or a share below 1, not {show(steps)}"
                    )
                setattr(self, name, int(steps))

    def _check_best(self) -> None:
        wanted = "load_best_model_at_end" if self.load_best_model_at_end else "save_strategy: best"
        if not self.load_best_model_at_end and self.save_strategy != SaveStrategy.BEST:
            return
        if self.eval_strategy == IntervalStrategy.NO:
            raise InputError(
                f"GKDConfig setting '{wanted}' needs evaluations to choose from; set eval_strategy to steps or epoch."
            )
        if self.load_best_model_at_end and self.save_strategy != SaveStrategy.BEST:
            if self.save_strategy != self.eval_strategy:
                raise InputError(
                    "GKDConfig field 'load_best_model_at_end' needs a checkpoint for every evaluation; set "
                    f"save_strategy to {self.eval_strategy.value}, like eval_strategy."
                )
            if self.eval_strategy == IntervalStrategy.STEPS and not is_multiple(
                self.save_steps, self.eval_steps
            ):
                raise InputError(
                    "GKDConfig field 'load_best_model_at_end' needs save_steps to be a multiple of eval_steps, "
                    f"but they are {self.save_steps} and {self.eval_steps}."
                )
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "divergence"))

    # ---- What is checked in the file system, before any model is loaded ----

    def validate_files(self) -> None:
        """Check paths and DeepSpeed files, and that output_dir can be written.

        Raises:
            InputError: a file or directory is missing, malformed, contradicts a field, or cannot be
                written.
        """
        self.read_deepspeed_files()
        check_model("model_name_or_path", self.model_name_or_path, self.model_init_kwargs)
        check_model(
            "teacher_model_name_or_path",
            self.teacher_model_name_or_path,
            self.teacher_model_init_kwargs,
        )
        check_dataset("dataset_name", self.dataset_name)
        if self.chat_template_path is not None:
            check_path_or_hub_name(
                "chat_template_path",
                self.chat_template_path,
                "a Jinja file or a tokenizer's directory",
            )
        if isinstance(self.resume_from_checkpoint, str) and self.resume_from_checkpoint != "auto":
            if not Path(self.resume_from_checkpoint).is_dir():
                raise wrong(
                    "resume_from_checkpoint",
                    f"names {show(self.resume_from_checkpoint)}, which is not a directory; give a "
                    "checkpoint-<step> directory, true or auto",
                )
        obstacle = obstacle_to_writing(self.output_dir)
        if obstacle:
            where = f"is {show(self.output_dir)}, where nothing can be written ({obstacle})"
            raise wrong("output_dir", f"{where}; choose another directory")
        check_stop_file(self.stop_path)

    def read_deepspeed_files(self) -> tuple[dict | None, dict | None]:
        """The student's and the teacher's DeepSpeed configuration, read and checked; None if not
        given.
        """
        student = read_deepspeed("deepspeed", self.deepspeed)
        teacher = read_deepspeed("teacher_deepspeed", self.teacher_deepspeed)
        if student is not None:
            check_student_file(student, self)
        if teacher is not None:
            check_teacher_file(teacher, self)
        return student, teacher

    def check_output_dir_is_free(self, resume: bool | str | None) -> None:
        """What training would write over: call it before training begins, with the value of
        resume_from_checkpoint that counts. Whoever only evaluates may stand in an old run's
        directory.

        Raises:
            InputError: output_dir is one of the inputs, or holds a run that is neither continued
                nor given up.
        """
        directory = Path(self.output_dir)
        for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
            other = getattr(self, name)
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
        if self.overwrite_output_dir or resume:
            return
        traces = [
            *directory.glob("checkpoint-*"),
            *directory.glob("metrics.jsonl"),
            *directory.glob("*.safetensors"),
        ]
        if traces:
            raise wrong(
                "output_dir",
                f"is {show(self.output_dir)}, which already holds a run ({traces[0].name}); choose another "
                "directory, or set resume_from_checkpoint: auto to continue it, or overwrite_output_dir: "
                "true to replace it",
            )

    # ---- Derived values ----

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, without tokens or passwords."""
        return {
            field.name: plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not field.metadata["secret"]
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` with text in place of nested values, as transformers' callbacks want it."""
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in self.to_dict().items()
        }

    # transformers' callbacks read these from TrainingArguments; the launcher sets the variables.
    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", max(self.local_rank, 0)))

    @property
    def should_log(self) -> bool:
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        return self.process_index == 0

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size

    @property
    def stop_path(self) -> str:
        """The file whose appearance stops the run."""
        return self.stop_file or os.path.join(self.output_dir, "STOP")


# ---- Single fields ----


def check_bounds(name: str, value: Any, bounds: dict[str, float]) -> None:
    if value is None:
        return
    inside = (
        (
            value >= bounds.get("low", -math.inf)
            and value <= bounds.get("high", math.inf)
            and value > bounds.get("above", -math.inf)
            and value < bounds.get("below", math.inf)
        )
        if bounds
        else True
    )
    if not inside:
        words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        wanted = " and ".join(f"{words[key]} {bounds[key]}" for key in words if key in bounds)
        raise wrong(
            name,
            f"must be {wanted}, not {show(value)}",
        )


def check_supported(field: dataclasses.Field, value: Any) -> None:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    switched_off = not value and not default  # "", [], None and False all say the same
    reason = NOT_SUPPORTED.get(field.name)
    if reason and value != default and not switched_off:
        raise InputError(
            f"GKDConfig field '{field.name}' is not supported by gkd_ds ({reason}); remove it."
        )


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


# ---- Writing ----


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, without secrets: a nested entry such as
    model_init_kwargs={"token": ...} is left out, and the values of secret environment variables are
    hidden.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        open_keys = [key for key in value if key in OPEN_KEYS or not SECRET_KEYS.search(str(key))]
        return {str(key): plain(value[key]) for key in open_keys}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else redact(str(value))
