"""What a resume does about a field whose value is not the one that the checkpoint was written with.

A checkpoint holds weights, the optimizer's moments, counters, and the position in the data. The
rest is the configuration's: a field that has changed acts from the next window on, and is named.
The schedule of the learning rate is evaluated anew, at the number of updates so far and for the
number of updates now asked for. Whatever a checkpoint cannot go on with is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.redaction import redact


class Change(Enum):
    """What becomes of a change."""

    QUIET = "acts; no window computes anything else because of it"
    ACTS = "acts, and is named"
    LOADS = "acts where the student is loaded, and is named; its weights are the checkpoint's"
    MEASURES = "acts, and is named; what was measured before stays as it was measured"
    OPTIMIZER = "acts, and is named, unless the caller passes an optimizer"
    SCHEDULE = "acts, and is named, unless the caller passes a schedule"
    PAST = "named, and changes nothing: it acts before the first update"
    # Whether these may differ depends on what they lead to: Windows.schedule for the first,
    # engine_files for the second.
    SAMPLES = "refused where the windows would hold other samples, else it acts, and is named"
    ENGINE = "refused where the engine could not read its files, else it acts, and is named"


TABLE = {
    Change.QUIET: """
        output_dir overwrite_output_dir do_train do_eval full_determinism max_runtime stop_file
        max_bad_updates watchdog_timeout remove_unused_columns local_rank deepspeed_log_level
        report_to run_name project logging_strategy logging_steps logging_first_step
        logging_nan_inf_filter log_rollouts log_level disable_tqdm prediction_loss_only
        save_strategy save_steps save_total_limit save_only_model resume_from_checkpoint
        merge_on_export push_to_hub hub_model_id hub_strategy hub_token hub_private_repo
        hub_revision hub_always_push do_predict torch_empty_cache_steps logging_dir
        trackio_space_id trackio_bucket_id trackio_static_space_id log_level_replica
        log_on_each_node include_num_input_tokens_seen include_tokens_per_second
        skip_memory_metrics eval_do_concat_batches batch_eval_metrics include_for_metrics
        save_weights_in_checkpoints restore_callback_states_from_checkpoint
        speculation_disk_mb""",
    Change.LOADS: "model_name_or_path model_revision model_init_kwargs dtype torch_dtype",
    Change.ACTS: """
        trust_remote_code attn_implementation disable_dropout dataset_num_proc max_skipped_rows
        lmbda seq_kd rollout_engine rollout_speculation speculation_share
        num_train_epochs max_steps max_grad_norm tf32
        gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
        activation_checkpointing_kwargs packing packing_strategy eval_packing padding_free
        use_liger_kernel liger_kernel_config torch_compile torch_compile_backend
        torch_compile_mode rollout_memory_mb
        offload_optimizer_states score_memory_mb targets_memory_mb loss_memory_mb
        learn_tokens_per_micro_batch teacher_deepspeed use_cpu ddp_backend ddp_timeout
        eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_policy
        load_best_model_at_end metric_for_best_model greater_is_better""",
    Change.MEASURES: """
        teacher_model_name_or_path teacher_model_init_kwargs dataset_test_split beta temperature
        divergence_temperature max_new_tokens eval_max_samples predict_with_generate
        bf16_full_eval fp16_full_eval""",
    Change.OPTIMIZER: """
        learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim_args
        optim_target_modules""",
    Change.SCHEDULE: "lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps",
    Change.PAST: "eval_on_start",
    Change.SAMPLES: """
        seed data_seed dataset_name dataset_config dataset_train_split row_errors
        chat_template_path eos_token pad_token max_length truncation_mode train_on
        assistant_only_loss dataloader_drop_last
        per_device_train_batch_size gradient_accumulation_steps""",
    Change.ENGINE: """
        bf16 fp16 optim deepspeed use_peft lora_r lora_alpha lora_dropout lora_target_modules
        lora_target_parameters lora_modules_to_save use_rslora use_dora""",
}
CHANGES = {name: change for change, names in TABLE.items() for name in names.split()}
PASSED = {Change.OPTIMIZER: "optimizer", Change.SCHEDULE: "schedule"}


def settings(config: GKDConfig) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: with what its DeepSpeed files hold, not only
    their names.
    """
    files = zip(("deepspeed", "teacher_deepspeed"), config.read_deepspeed_files(), strict=True)
    return json.loads(json.dumps(redact({**config.to_dict(), **dict(files)})))


def changes(
    before: dict[str, Any], now: dict[str, Any], passed: tuple[str, ...] = ()
) -> Iterator[str]:
    """One sentence for each change that is to be named. Both are `settings`; `passed` says which of
    "optimizer" and "schedule" the caller passes.
    """
    for name, change in CHANGES.items():
        if name in before and change is not Change.QUIET:
            for place, was, value in _differences(name, before[name], now.get(name)):
                yield difference(place, was, value) + _effect(change, now, passed)


def difference(name: str, was: Any, now: Any) -> str:
    return f"differs from the checkpoint: {name} was {_short(was)} and is now {_short(now)}"


def _effect(change: Change, now: dict[str, Any], passed: tuple[str, ...]) -> str:
    """What a change does not do."""
    if change is Change.LOADS:
        return "; the weights are the checkpoint's"
    if change is Change.MEASURES and now["metric_for_best_model"] is not None:
        return "; evaluations before and after it are compared as if they were of one kind"
    if change is Change.PAST:
        return ", which changes nothing: it acts before the first update"
    if PASSED.get(change) in passed:
        return f", which changes nothing: the {PASSED[change]} is one that was passed"
    return ""


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values that differ, those inside of objects by their place: deepspeed.zero_optimization.
    stage.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            yield from _differences(f"{name}.{key}", was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def _short(value: Any, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."
