"""A field that gets another value: in a program that runs, or between a checkpoint and a resume.

A configuration is read at three times: when a trainer is made (models, data), when training begins
(engines, schedule), and whenever a field is needed. `Fields` knows what was assigned since it last
looked; it acts, or is refused because it comes too late. `CHANGES` says what a resume does about a
field (checkpoint/changed.py does it).
"""

import copy
from enum import Enum
from typing import Any

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import GROUPS, INACTIVE, OPTIONS
from gkd_ds.runtime.errors import InputError

# -- in a program that runs ----------------------------------------------------------------------

# What a trainer has read for good when it is made; groups of fields, and fields of other groups.
OF_TRAINER = {
    option.name for group in ("Models", "Adapters", "Data") for option in GROUPS[group]
} - {"disable_dropout", "remove_unused_columns"}
OF_TRAINER |= {"bf16", "fp16", "tf32", "deepspeed", "teacher_deepspeed", "use_cpu", "local_rank"}
OF_TRAINER |= {"log_level", "log_level_replica", "log_on_each_node", "report_to"}
OF_TRAINER |= {
    "skip_memory_metrics",
    "ddp_backend",
    "ddp_timeout",
    "max_runtime",
    "stop_file",
    "full_determinism",
}
# What is read anew whenever it is needed: these may change between any two windows.
AT_ANY_TIME = {
    *("lmbda", "seq_kd", "beta", "temperature", "divergence_temperature", "max_new_tokens"),
    *("rollout_memory_mb", "score_memory_mb", "targets_memory_mb", "loss_memory_mb"),
    *("learn_tokens_per_micro_batch", "offload_optimizer_states", "remove_unused_columns"),
    *("do_train", "do_eval", "do_predict", "torch_empty_cache_steps"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("log_rollouts", "include_num_input_tokens_seen", "include_tokens_per_second"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    *("save_weights_in_checkpoints", *INACTIVE),
    *(option.name for group in ("Evaluation", "Hub") for option in GROUPS[group]),
}
# What is read when training begins, beside what the engines are made with.
BEFORE_TRAINING = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps"),
    *("max_steps", "num_train_epochs", "seed", "data_seed", "max_bad_updates", "watchdog_timeout"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project"),
    *("restore_callback_states_from_checkpoint", "logging_dir", "disable_tqdm"),
    *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
    *("rollout_speculation", "speculation_share", "speculation_disk_mb"),
}


class Fields:
    """The fields of `config` as they were when this looked last."""

    def __init__(self, config: GKDConfig):
        self._config, self._seen = config, _values(config)

    def touched(self) -> bool:
        """Whether any field was assigned another value since `changed` was called last."""
        return _values(self._config) != self._seen

    def changed(self, while_training: bool, engines_are_made: bool) -> dict[str, Any]:
        """The fields that were assigned since the last call, with their values; validated.

        Raises InputError where a value is wrong, or comes too late to act.
        """
        values = _values(self._config)
        names = [name for name, value in values.items() if value != self._seen[name]]
        for name in names:
            if name in OF_TRAINER:
                raise InputError(
                    f"args.{name} was changed after the trainer was made, which had read it "
                    "already; set it before, or make another trainer."
                )
            if while_training and name not in AT_ANY_TIME:
                raise InputError(
                    f"args.{name} was changed while training, which had read it already; set it "
                    "before train()."
                )
            if engines_are_made and name not in AT_ANY_TIME | BEFORE_TRAINING:
                raise InputError(
                    f"args.{name} was changed after the engines were made, and several ranks keep "
                    "theirs; set it before the first train() or evaluate()."
                )
        if names:
            self._config.validate()
            self._seen = _values(self._config)
        return {name: self._seen[name] for name in names}


def _values(config: GKDConfig) -> dict[str, Any]:
    """Every field; lists and dicts as they are now."""
    values = {name: getattr(config, name) for name in OPTIONS}
    return {
        name: copy.deepcopy(value) if isinstance(value, (list, dict)) else value
        for name, value in values.items()
    }


# -- between a checkpoint and a resume ------------------------------------------------------------


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
