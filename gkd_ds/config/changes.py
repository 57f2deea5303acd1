"""A field that is assigned after the configuration was made: it acts, or it is refused.

A configuration is read at three times: when a trainer is made (models, data), when training begins
(engines, schedule), and whenever a field is needed. `Fields` knows what has changed since it last
looked, and refuses what comes too late.
"""

import copy
from typing import Any

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import GROUPS, INACTIVE, OPTIONS
from gkd_ds.runtime.errors import InputError

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
