"""What transformers' Trainer and TRL's GKDTrainer have and nothing here would ever call or read:
each by its name, with the place where the same is done.

A subclass that overrides one of these, a script that assigns or reads one, is told so at once:
nothing is ignored.
"""

from __future__ import annotations

from gkd_ds.runtime.errors import InputError

_LOSS = (
    "the loss is taken from hidden states, chunk by chunk: override generalized_jsd_loss, or write "
    "an Objective (gkd_ds/learn/objective.py)"
)
_WINDOW = (
    "a window passes through pipeline.rollout, score and learn: use callbacks, or write an "
    "Objective (gkd_ds/learn/objective.py)"
)
_LOOP = "gkd_ds/loop.py runs windows: use callbacks"
_EVALUATION = (
    "evaluation sums divergences: pass compute_metrics and preprocess_logits_for_metrics, or "
    "override evaluate"
)
_DATA = (
    "windows take their samples from the tokenized data set: change train_dataset, or pass "
    "data_collator"
)
_SAVING = "override save_model, or act in the callback on_save"
_STATE = "a checkpoint holds all that a resume needs; act in the callbacks on_save, on_train_begin"
_ENGINES = "both engines are DeepSpeed's: use the fields deepspeed and teacher_deepspeed"
_ACCELERATE = "there is no accelerate behind it: use the fields deepspeed and teacher_deepspeed"
_SEARCH = "there is no search inside of a run: make one trainer per trial"
_CARD = "pass model_name and tags to create_model_card or push_to_hub"
_GRADIENTS = "DeepSpeed clips: use max_grad_norm, and the grad_norm that is logged"
_OPTIMIZER = "override create_optimizer, or pass optimizers"

# Not there. (Names with an underscore are here because subclasses override them.)
INSTEAD: dict[str, str] = {
    "compute_loss": _LOSS,
    "compute_loss_func": _LOSS,
    "compute_loss_context_manager": _LOSS,
    "autocast_smart_context_manager": "set bf16 or fp16",
    "label_smoother": _LOSS,
    "loss_is_scaled_for_ga": "every completion token of a window weighs the same",
    "model_accepts_loss_kwargs": "every completion token of a window weighs the same",
    "training_step": _WINDOW,
    "_inner_training_loop": _LOOP,
    "_run_epoch": _LOOP,
    "_init_training_state": _LOOP,
    "_prepare_for_training": _LOOP,
    "_finalize_training": _LOOP,
    "_maybe_log_save_evaluate": "override log, evaluate or save_model",
    "set_initial_training_values": _LOOP,
    "end": "the process group is left when the program ends",
    "prediction_step": _EVALUATION,
    "prediction_loop": _EVALUATION,
    "evaluation_loop": _EVALUATION,
    "_evaluate": "override evaluate",
    "gather_function": _EVALUATION,
    "can_return_loss": _EVALUATION,
    "get_batch_samples": _DATA,
    "_get_num_items_in_batch": "every completion token of a window weighs the same",
    "_get_dataloader": _DATA,
    "_get_train_sampler": "the order of an epoch is a function of data_seed",
    "_get_eval_sampler": "every row is evaluated once",
    "_prepare_input": _DATA,
    "_prepare_inputs": _DATA,
    "_prepare_context_parallel_inputs": _DATA,
    "_prepare_dataset": "prepare the rows before, with dataset.map",
    "_reject_skip_prepare_without_labels": _DATA,
    "_set_signature_columns_if_needed": "only known columns are ever read",
    "_signature_columns": "only known columns are ever read",
    "_remove_unused_columns": "only known columns are ever read",
    "_get_collator_with_removed_columns": "only known columns are ever read",
    "get_optimizer_cls_and_kwargs": _OPTIMIZER,
    "optimizer_cls_and_kwargs": _OPTIMIZER,
    "_get_learning_rate": "read trainer.get_learning_rates() or the logged learning_rate",
    "_clip_grad_norm": _GRADIENTS,
    "_get_grad_norm": _GRADIENTS,
    "_mixed_mesh_grad_norm": _GRADIENTS,
    "_has_mixed_mesh_grads": _GRADIENTS,
    "_defer_fsdp_gradient_reduction": _ENGINES,
    "_sync_replicated_trainable_parameters": _ENGINES,
    "_wrap_model": _ENGINES,
    "_move_model_to_device": _ENGINES,
    "place_model_on_device": _ENGINES,
    "is_model_parallel": _ENGINES,
    "get_sp_size": _ENGINES,
    "get_cp_size": _ENGINES,
    "get_tp_size": _ENGINES,
    "_build_accelerator_args": _ACCELERATE,
    "create_accelerator_and_postprocess": _ACCELERATE,
    "_validate_args": "GKDConfig.validate checks the fields",
    "_update_auto_batch_size": "set per_device_train_batch_size",
    "_track_num_input_tokens": "state.num_input_tokens_seen counts them",
    "store_flos": "state.total_flos counts them: override floating_point_ops",
    "current_flos": "read state.total_flos",
    "_save": _SAVING,
    "_get_output_dir": "set output_dir",
    "_determine_best_metric": "set metric_for_best_model",
    "_save_rng_state": _STATE,
    "_save_optimizer_and_scheduler": _STATE,
    "_save_scaler": _STATE,
    "_load_from_checkpoint": _STATE,
    "_load_best_model": "set load_best_model_at_end",
    "_load_rng_state": _STATE,
    "_load_optimizer_and_scheduler": _STATE,
    "_load_scaler": _STATE,
    "_load_callback_state": _STATE,
    "_issue_warnings_after_load": _STATE,
    "init_hf_repo": "the repository is made by the first push",
    "_push_from_checkpoint": "override push_to_hub, or set hub_strategy",
    "_finish_current_push": "a push always waits for the one before it",
    "hyperparameter_search": _SEARCH,
    "call_model_init": _SEARCH,
    "model_init": _SEARCH,
    "hp_name": _SEARCH,
    "hp_search_backend": _SEARCH,
    "_hp_search_setup": _SEARCH,
    "_report_to_hp_search": _SEARCH,
    "_tune_save_checkpoint": _SEARCH,
    "neftune_noise_alpha": "noise would make the student differ from the one that sampled",
    "generation_kwargs": "use trainer.generation_config, or the fields temperature, max_new_tokens",
    "_tag_names": _CARD,
    "_name": _CARD,
    "_paper": _CARD,
    "_template_file": _CARD,
    "_send_telemetry": "nothing is sent",
}
# There for those who look at what they give; another one would decide nothing.
ONLY_READ: dict[str, str] = {
    "get_train_dataloader": _DATA,
    "get_eval_dataloader": _DATA,
    "get_test_dataloader": _DATA,
    "generate_on_policy_outputs": "a rollout engine samples (gkd_ds/rollout/engine.py)",
    "num_examples": _DATA,
    "get_total_train_batch_size": "set per_device_train_batch_size, gradient_accumulation_steps",
    "model": "the engines hold the model: make another trainer for another one",
    "teacher_model": "the engines hold the model: make another trainer for another one",
    "processing_class": "the data is tokenized: make another trainer for another tokenizer",
    "data_collator": "the data is tokenized: pass it to the constructor",
    "args": "it is read everywhere: assign to its fields",
    "label_names": "labels are always the completion tokens",
}


# What else of TRL's trainer, and of earlier ones of transformers', subclasses may define anew.
_TRL = {"generalized_jsd_loss", "create_model_card", "lmbda", "beta", "temperature", "seq_kd"}
_TRL |= {"generation_config", "tokenizer", "hub_model_id"}


def refuse_overrides(trainer_class: type, ours: type) -> None:
    """Raise InputError where a subclass of `ours` overrides what would never be called, or gives a
    name to something of its own that `ours` has for something else.
    """
    above = trainer_class.__mro__[: trainer_class.__mro__.index(ours)]
    overridden = {name for one in trainer_class.__mro__ for name in vars(one)}
    for name in INSTEAD:
        if name in overridden:
            raise refusal(name, trainer_class)
    overridden = {name for one in above for name in vars(one)}
    for name in ONLY_READ:
        if name in overridden:
            raise refusal(name, trainer_class)
    if above:
        from transformers import Trainer  # late: it takes seconds, and only subclasses need it

        theirs = {name for name, value in vars(Trainer).items() if callable(value)}
        for name in sorted(theirs & overridden):
            if name not in dir(ours):
                raise refusal(name, trainer_class)
        known = {*dir(Trainer), *_TRL, *vars(type("Bare", (ours,), {}))}
        for name in sorted(overridden & {*dir(ours)} - known):
            if not name.startswith("__"):
                raise taken(name, trainer_class)


def refusal(name: str, trainer_class: type) -> InputError:
    """That `name` is assigned or overridden and would not be called."""
    instead = INSTEAD.get(name) or ONLY_READ.get(name) or "gkd_ds/MIGRATING.md says what is"
    return InputError(
        f"{trainer_class.__name__}.{name} would never be called by gkd_ds, where {instead}."
    )


def taken(name: str, trainer_class: type) -> InputError:
    """That `name` is one that neither transformers nor TRL has, and something else here."""
    return InputError(
        f"{trainer_class.__name__}.{name} would take the place of something that gkd_ds keeps "
        "under that name; choose another name."
    )


def not_there(name: str) -> AttributeError:
    """That `name` is read."""
    return AttributeError(f"trainer.{name} does not exist in gkd_ds, where {INSTEAD[name]}.")
