"""GKDTrainer: TRL's name, arguments and methods over our loop of windows.

    trainer = GKDTrainer(model="student", teacher_model="teacher", args=GKDConfig(output_dir="run"),
                         train_dataset=dataset)
    trainer.train()

The constructor checks what it was given (engine/inputs.py), joins the other ranks, and builds the
engines (pipeline.py). loop.py runs the windows; checkpoint/session.py keeps the run's directory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from gkd_ds.checkpoint import export
from gkd_ds.checkpoint.progress import initial_state
from gkd_ds.config.config import GKDConfig
from gkd_ds.data.windows import Windows
from gkd_ds.engine import process
from gkd_ds.engine.inputs import Inputs
from gkd_ds.learn import trl
from gkd_ds.learn.optim import require_optimizer
from gkd_ds.loop import WindowLoop
from gkd_ds.monitor.callbacks import callbacks_of
from gkd_ds.monitor.evaluation import (
    evaluate_sets,
    refuse_impossible_evaluation,
)
from gkd_ds.pipeline import Pipeline
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.interrupts import Interrupts
from gkd_ds.runtime.launcher import LauncherGone, check_hostfile, is_gone

logger = logging.getLogger(__name__)


class GKDTrainer(WindowLoop):
    """Distils `teacher_model` into `model` by generalized knowledge distillation, with DeepSpeed
    engines for both.

    Args (TRL's): `model`, `teacher_model` (names or transformers models), `args` (GKDConfig),
    `train_dataset`, `eval_dataset` (one, or a dict of them), `processing_class` (the tokenizer;
    default the student's), `callbacks` (transformers' TrainerCallback), `optimizers` (torch
    optimizer, scheduler). Every rank builds it alike; without a launcher it is the only rank.
    Raises InputError for wrong input, before any weights are loaded.
    """

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: GKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
    ):
        _refuse_unsupported(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_hostfile()
        config = args if args is not None else GKDConfig()
        config.validate()  # fields may have been set since it was made
        require_optimizer(config)
        _show_log(config)
        callbacks = [*callbacks_of(config), *(callbacks or [])]
        # The time budget includes loading, and a stop file that appears meanwhile counts.
        interrupts = Interrupts(config.stop_path, config.max_runtime)
        inputs = Inputs.read(
            config,
            model,
            teacher_model,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            formatting_func,
        )
        refuse_impossible_evaluation(config, inputs.evaluation)
        logger.info("Models, tokenizer and data have been checked.")
        _start(inputs)
        windows = Windows.of(config, inputs.train, ranks.world_size())
        state = initial_state(config, windows.scheduler.windows_per_epoch)
        pipeline = Pipeline.build(inputs, state.max_steps, optimizers)
        super().__init__(inputs, windows, state, pipeline, interrupts, callbacks)

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Run windows until `max_steps`, a callback, a signal, the stop file or the time budget
        ends the run.

        `resume_from_checkpoint`: True (newest valid one in output_dir), "auto" (the same, or start)
        or a directory. The finished student is left in output_dir. After an early stop
        `stop_reason` says why. Raises InputError when there is nothing to resume from, or a run in
        output_dir that is neither resumed nor overwritten; TrainingStopped when too many updates in
        a row were not finite.
        """
        _refuse_unsupported(trial=trial, **kwargs)
        if self.inputs.train is None:
            raise InputError("no train_dataset is given; pass one to GKDTrainer.")
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        return self.run(resume_from_checkpoint)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out divergence (monitor/evaluation.py) of `eval_dataset`, by default the one given
        to the trainer. Collective.

        Returns `<prefix>_loss`, `<prefix>_on_policy_loss`, ...; with several sets
        `<prefix>_<name>_loss`.
        """
        sets = self.inputs.evaluation
        if eval_dataset is not None:
            sets = self.inputs.tokenize_evaluation(eval_dataset)
            self.pipeline.try_rows(self.inputs.lengths.with_sets(self.args, sets))
        if not sets:
            raise InputError("no eval_dataset is given; pass one to GKDTrainer or to evaluate().")
        metrics = evaluate_sets(self.pipeline, sets, self.args, metric_key_prefix)
        step = self.state.global_step
        if self.tracker is not None:
            before, after = f"{metric_key_prefix}_", f"{metric_key_prefix}/"
            record = {key.replace(before, after, 1): value for key, value in metrics.items()}
            self.tracker.log_eval({"step": step, **record})
            self.progress.evaluations += 1
        self.state.log_history.append({**metrics, "step": step, "epoch": self.state.epoch})
        self._event("on_log", metrics)
        self._event("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the student as a Hugging Face directory (default: output_dir). Collective.

        Raises CheckpointError, on all ranks, when it could not be written.
        """
        self.publisher.save(output_dir or self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload output_dir (without checkpoints) to the hub; rank 0 does it, the others return
        None.

        kwargs go to the model card, as in TRL: model_name, dataset_name (or dataset),
        finetuned_from, language, license, tags. Raises InputError for others.
        """
        card = export.card_of_arguments(kwargs)
        return self.publisher.push(commit_message, blocking, token, revision, card=card)

    # -- small things of transformers' Trainer ----------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers TrainerCallback."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback, by instance or class."""
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return ranks.rank() == 0

    generalized_jsd_loss = staticmethod(trl.generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(trl.generate_on_policy_outputs)


def _start(inputs: Inputs) -> None:
    """Join the other ranks, and see that they were started alike. A collective."""
    config = inputs.config
    process.start(config)
    if ranks.any_rank(is_gone()):
        raise LauncherGone(
            "the deepspeed launcher was ended before the first update; start the run again."
        )
    inputs.refuse_different_ranks()
    logger.info("%d ranks have met, started alike.", ranks.world_size())
    torch.manual_seed(config.seed)


def _show_log(config: GKDConfig) -> None:
    """Show the package's own log as log_level says; of the other ranks as log_level_replica."""
    if (config.log_level if config.should_log else config.log_level_replica) == "passive":
        return
    log = logging.getLogger("gkd_ds")
    log.setLevel(config.get_process_log_level())
    if not log.hasHandlers():  # a script that has configured logging gets it there
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        log.addHandler(handler)


def _refuse_unsupported(**arguments: Any) -> None:
    """Refuse by name what TRL's trainer takes and this one does not yet."""
    for name, value in arguments.items():
        if value is not None:
            raise InputError(f"GKDTrainer does not support {name} yet; leave it out.")
