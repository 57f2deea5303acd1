"""What TRL's configuration has and gkd_ds does not act on: each field, its default and the reason.

These fields exist so that code and recipes written for TRL keep working. Each is accepted at its
default and refused *by name* at any other value. To support one, move its row to GKDConfig.
"""

import dataclasses
from typing import Any

from gkd_ds.runtime.errors import InputError

# Reasons of more than one field.
_SUMS = "evaluation keeps sums, not predictions"
_NO_APEX = "apex is not used; set fp16 or bf16"
_MEMORY = "memory is bounded by rollout_memory_mb, score_memory_mb and loss_memory_mb"
_TOKENIZED_ONCE = "the data set is tokenized once, before training, and needs no loader processes"
_BY_LENGTH = "the learn phase already packs a window's samples by length"
_ZERO = "DeepSpeed ZeRO-3 shards the student"
_NO_ACCELERATE = "the engines are DeepSpeed's own, without accelerate"
_REDUCED = "gradients are reduced by DeepSpeed; use its file"
_ADAMW = "only AdamW is available"
_NOT_COMPILED = "ZeRO-3 moves parameters in hooks, which compilation would break"
_CHUNKED = "the loss is already computed chunk by chunk; see loss_memory_mb"
_ROWS = "rows are always read as chat messages or prompt/completion"
_PACKED = "the learn phase packs a window's samples itself; see learn_tokens_per_micro_batch"
_NO_TPU = "DeepSpeed has no engine for TPUs"

# Name, type, default (`list` is an empty one), and the reason, which says what to do.
TABLE: list[tuple[str, Any, Any, str]] = [
    ("do_predict", bool, False, "there is no prediction loop; use GKDTrainer.evaluate"),
    (
        "per_gpu_train_batch_size",
        int | None,
        None,
        "it is an old name; use per_device_train_batch_size",
    ),
    (
        "per_gpu_eval_batch_size",
        int | None,
        None,
        "it is an old name; use per_device_eval_batch_size",
    ),
    ("push_to_hub_model_id", str | None, None, "it is an old name; use hub_model_id"),
    (
        "push_to_hub_organization",
        str | None,
        None,
        "it is an old name; put the organization into hub_model_id",
    ),
    ("push_to_hub_token", str | None, None, "it is an old name; use hub_token"),
    ("no_cuda", bool, False, "it is an old name; use use_cpu"),
    ("use_mps_device", bool, False, "DeepSpeed has no engine for MPS"),
    ("tpu_num_cores", int | None, None, _NO_TPU),
    ("tpu_metrics_debug", bool, False, _NO_TPU),
    ("eval_accumulation_steps", int | None, None, _SUMS),
    ("eval_do_concat_batches", bool, True, _SUMS),
    ("eval_use_gather_object", bool, False, _SUMS),
    ("batch_eval_metrics", bool, False, _SUMS),
    ("include_inputs_for_metrics", bool, False, _SUMS),
    ("include_for_metrics", list, list, _SUMS),
    ("label_names", list | None, None, "labels are always the completion tokens"),
    ("use_legacy_prediction_loop", bool, False, "there is only one evaluation loop"),
    ("past_index", int, -1, "the models have no past to carry between batches"),
    ("bf16_full_eval", bool, False, "evaluation uses the precision of training; set bf16"),
    ("fp16_full_eval", bool, False, "evaluation uses the precision of training; set fp16"),
    ("fp16_opt_level", str, "O1", _NO_APEX),
    ("fp16_backend", str, "auto", _NO_APEX),
    ("half_precision_backend", str, "auto", _NO_APEX),
    ("jit_mode_eval", bool, False, "evaluation runs the ZeRO engines, which cannot be traced"),
    ("debug", list | str, "", "use max_bad_updates, which stops a run with a diagnosis"),
    ("torch_empty_cache_steps", int | None, None, _MEMORY),
    ("auto_find_batch_size", bool, False, _MEMORY),
    ("log_level_replica", str, "warning", "only the first rank logs; use log_level"),
    ("log_on_each_node", bool, True, "only the first rank logs"),
    ("save_safetensors", bool, True, "models are always written as safetensors"),
    ("save_on_each_node", bool, False, "checkpoints need a directory that all nodes share"),
    ("dataloader_num_workers", int, 0, _TOKENIZED_ONCE),
    ("dataloader_prefetch_factor", int | None, None, _TOKENIZED_ONCE),
    ("dataloader_persistent_workers", bool, False, _TOKENIZED_ONCE),
    ("dataloader_pin_memory", bool, True, _TOKENIZED_ONCE),
    ("group_by_length", bool, False, _BY_LENGTH),
    ("length_column_name", str, "length", _BY_LENGTH),
    ("fsdp", list | str | None, None, _ZERO),
    ("fsdp_min_num_params", int, 0, _ZERO),
    ("fsdp_transformer_layer_cls_to_wrap", str | None, None, _ZERO),
    (
        "fsdp_config",
        dict | str | None,
        None,
        "DeepSpeed ZeRO-3 shards the student; use deepspeed",
    ),
    ("accelerator_config", dict | str | None, None, _NO_ACCELERATE),
    ("parallelism_config", dict | None, None, _NO_ACCELERATE),
    ("mp_parameters", str, "", "it belongs to SageMaker"),
    ("ddp_find_unused_parameters", bool | None, None, _REDUCED),
    ("ddp_bucket_cap_mb", int | None, None, _REDUCED),
    ("ddp_broadcast_buffers", bool | None, None, _REDUCED),
    ("label_smoothing_factor", float, 0.0, "the teacher's whole distribution is the target"),
    (
        "neftune_noise_alpha",
        float | None,
        None,
        "noise in the embeddings would make the student differ from the one that sampled",
    ),
    (
        "optim_args",
        str | None,
        None,
        "AdamW takes its values from learning_rate, weight_decay and adam_*",
    ),
    ("optim_target_modules", str | list | None, None, _ADAMW),
    ("adafactor", bool, False, _ADAMW),
    (
        "trackio_space_id",
        str | None,
        "trackio",
        "metrics go to metrics.jsonl and, with report_to: wandb, to W&B",
    ),
    ("hub_always_push", bool, False, "a push always waits for the one before it"),
    ("torchdynamo", str | None, None, _NOT_COMPILED),
    ("torch_compile", bool, False, _NOT_COMPILED),
    ("torch_compile_backend", str | None, None, _NOT_COMPILED),
    ("torch_compile_mode", str | None, None, _NOT_COMPILED),
    (
        "ray_scope",
        str | None,
        "last",
        "there is no hyperparameter search inside a run; see launch/ for sweeps",
    ),
    (
        "include_tokens_per_second",
        bool,
        False,
        "perf/rollout_tokens_per_s is always in metrics.jsonl",
    ),
    ("use_liger_kernel", bool, False, _CHUNKED),
    ("liger_kernel_config", dict | None, None, _CHUNKED),
    ("dataset_kwargs", dict | None, None, _ROWS),
    ("dataset_text_field", str, "text", _ROWS),
    ("packing", bool, False, _PACKED),
    ("packing_strategy", str, "bfd", _PACKED),
    ("eval_packing", bool | None, None, _PACKED),
    ("padding_free", bool, False, _PACKED),
    (
        "average_tokens_across_devices",
        bool,
        True,
        "every completion token of a window weighs the same, on whatever rank",
    ),
    ("completion_only_loss", bool | None, None, "the loss is always on the completion only"),
    ("assistant_only_loss", bool, False, "the loss is always on the last assistant turn only"),
    ("loss_type", str, "nll", "the loss is always the generalized JSD; see beta"),
    (
        "activation_offloading",
        bool,
        False,
        "use gradient_checkpointing, or DeepSpeed's activation_checkpointing block",
    ),
    (
        "pad_to_multiple_of",
        int | None,
        None,
        "sequences of similar length are padded together, to the longest",
    ),
    (
        "logging_dir",
        str | None,
        None,
        "W&B's files go to output_dir; set WANDB_DIR for another place",
    ),
    (
        "include_num_input_tokens_seen",
        bool | str,
        False,
        "completion tokens are always counted, in metrics.jsonl",
    ),
    ("skip_memory_metrics", bool, True, "python -m gkd_ds.train --dry_run estimates memory"),
    ("restore_callback_states_from_checkpoint", bool, False, "callbacks start anew"),
    (
        "ignore_data_skip",
        bool,
        False,
        "a position in the data is a function of the step, so nothing is skipped over",
    ),
]

# Names that are no fields: those of TRL's other groups of arguments (ModelConfig, ScriptArguments)
# and old ones, as patterns, with what to do. TRL's own flags are recognised, so that nobody is sent
# to the field that happens to be spelt most alike.
_NO_ADAPTERS = "adapters (LoRA) are not there yet, all weights are trained: leave it out"
_NOT_QUANTIZED = "weights are not quantized: leave it out, and choose their type with dtype"
ELSEWHERE: dict[str, str] = {
    "torch_dtype": "use dtype",
    "model_revision": "write revision into model_init_kwargs",
    "use_peft": _NO_ADAPTERS,
    "lora_*": _NO_ADAPTERS,
    "use_*lora": _NO_ADAPTERS,
    "use_dora": _NO_ADAPTERS,
    "load_in_?bit": _NOT_QUANTIZED,
    "bnb_*": _NOT_QUANTIZED,
    "use_bnb_*": _NOT_QUANTIZED,
    "dataset_streaming": "the data set is read whole, before training: leave it out",
    "gradient_checkpointing_use_*": "write use_reentrant into gradient_checkpointing_kwargs",
    "ignore_bias_buffers": "leave it out: nothing is wrapped in DistributedDataParallel",
    "evaluation_strategy": "use eval_strategy",
    "max_seq_length": "use max_length",
    "tokenizer": "the student's is used; pass another one to GKDTrainer as processing_class",
}

REASONS: dict[str, str] = {name: reason for name, _, _, reason in TABLE}


def _field(name: str, default: Any, reason: str) -> dataclasses.Field:
    kept = {"default_factory": list} if default is list else {"default": default}
    metadata = {
        "help": f"Accepted at its default only: {reason}.",
        "heading": None,
        "secret": name == "push_to_hub_token",
        "bounds": {},
    }
    return dataclasses.field(**kept, repr=False, metadata=metadata)


# GKDConfig inherits them; keyword-only, so that its positional arguments begin with its own fields.
UnsupportedFields = dataclasses.make_dataclass(
    "UnsupportedFields",
    [(name, kind, _field(name, default, reason)) for name, kind, default, reason in TABLE],
    kw_only=True,
)


def refuse_unsupported(config: UnsupportedFields) -> None:
    """Raise InputError for the first of these fields that is not at its default."""
    for name, _, default, reason in TABLE:
        value, kept = getattr(config, name), [] if default is list else default
        switched_off = not value and not kept  # "", [], None and False all say the same
        if value != kept and not switched_off:
            raise InputError(
                f"GKDConfig field '{name}' is not supported by gkd_ds ({reason}); remove it."
            )
