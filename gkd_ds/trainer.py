"""GKDTrainer: TRL's name, arguments and methods over our loop of windows.

    trainer = GKDTrainer(model="student", teacher_model="teacher", args=GKDConfig(output_dir="run"),
                         train_dataset=dataset)
    trainer.train()

The constructor checks what it was given (engine/inputs.py), joins the other ranks, and loads the
models (models.py). engines.py builds the engines when they are needed, loop.py runs the windows,
saving.py keeps what they have learned, surface.py has the small things that scripts ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    TrainerMemoryTracker,
    TrainOutput,
    align_special_tokens,
)

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples
from gkd_ds.engine import process
from gkd_ds.engine.compilation import require_backend
from gkd_ds.engine.inputs import Inputs
from gkd_ds.learn import trl
from gkd_ds.learn.optim import require_optimizer, require_pair
from gkd_ds.monitor import evaluation
from gkd_ds.monitor.callbacks import callbacks_of, may_add_metrics
from gkd_ds.monitor.predictions import Wanted
from gkd_ds.overrides import refuse_overrides
from gkd_ds.pipeline import Formula
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.interrupts import Interrupts
from gkd_ds.runtime.launcher import LauncherGone, check_hostfile, is_gone
from gkd_ds.surface import Surface

logger = logging.getLogger(__name__)


class GKDTrainer(Surface):
    """Distils `teacher_model` into `model` by generalized knowledge distillation, with DeepSpeed
    engines for both.

    Args (TRL's): `model`, `teacher_model` (names or transformers models), `args` (GKDConfig),
    `data_collator` (makes TRL's batches of rows), `train_dataset`, `eval_dataset` (one, or a dict
    of them), `processing_class` (the tokenizer; default the student's), `compute_metrics` and
    `preprocess_logits_for_metrics` (monitor/predictions.py), `callbacks` (transformers'
    TrainerCallback), `optimizers` (torch optimizer, scheduler), `peft_config` (an adapter for the
    student), `formatting_func` (makes an example of a row). Every rank builds it alike; without a
    launcher it is the only rank. Raises InputError for wrong input, before any weights are loaded.
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
        refuse_overrides(type(self), GKDTrainer)
        check_hostfile()
        config = args if args is not None else GKDConfig()
        config.validate()  # fields may have been set since it was made
        require_optimizer(config)
        require_pair(optimizers)
        require_backend(config)
        _show_log(config)
        callbacks = [*callbacks_of(config), *(callbacks or [])]
        self._memory_tracker = TrainerMemoryTracker(config.skip_memory_metrics)
        self._memory_tracker.start()  # here and below: transformers knows the caller by its name
        # The time budget includes loading, and a stop file that appears meanwhile counts.
        interrupts = Interrupts(config.stop_path, config.max_runtime)
        inputs = Inputs.read(
            config,
            model,
            teacher_model,
            train_dataset,
            eval_dataset,
            processing_class,
            data_collator,
            peft_config,
            formatting_func,
        )
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        has_own = compute_metrics is not None or type(self).evaluate is not GKDTrainer.evaluate
        has_own = has_own or may_add_metrics(callbacks)
        evaluation.refuse_impossible_evaluation(config, inputs.evaluation, has_own)
        logger.info("Models, tokenizer and data have been checked.")
        _start(inputs)
        super().__init__(inputs, interrupts, callbacks, optimizers)
        self._memory_tracker.stop_and_update_metrics()

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
        `stop_reason` says why. Called again, it begins anew with the weights as they are now.
        Raises InputError when there is nothing to resume from, or a run in output_dir that is
        neither resumed nor overwritten; TrainingStopped when too many updates in a row were not
        finite.
        """
        _refuse_unsupported(trial=trial, **kwargs)
        if self.inputs.train is None:
            raise InputError("no train_dataset is given; pass one to GKDTrainer.")
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._memory_tracker.start()
        self._ignore_keys_for_eval = ignore_keys_for_eval
        # What is saved stops where the tokenizer's turns end, and where the student's did.
        align_special_tokens(self.model, self.processing_class)
        self.callback_handler.train_dataloader = self.get_train_dataloader()
        return self.run(resume_from_checkpoint)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out divergence (monitor/evaluation.py) and the caller's metrics, of `eval_dataset`
        (rows, several by name, or the name of one of the trainer's), by default of the trainer's.
        Collective.

        Returns `<prefix>_loss`, `<prefix>_on_policy_loss`, ...; with several sets
        `<prefix>_<name>_loss`.
        """
        self._read_fields()
        sets = self.inputs.evaluation
        if isinstance(eval_dataset, str):
            sets = {"": sets[eval_dataset]}
        elif eval_dataset is not None:
            sets = self.inputs.tokenize_evaluation(eval_dataset)
        if not sets:
            raise InputError("no eval_dataset is given; pass one to GKDTrainer or to evaluate().")
        self._memory_tracker.start()
        metrics: dict[str, float] = {}
        record: dict[str, Any] = {"step": self.state.global_step}
        before, after = f"{metric_key_prefix}_", f"{metric_key_prefix}/"
        with self.engines() as pipeline:
            if eval_dataset is not None:
                pipeline.try_rows(self.inputs.lengths.with_sets(self.args, sets))
            for name, examples in sets.items():
                of_set = self._evaluate_set(
                    examples, f"{before}{name}" if name else metric_key_prefix
                )
                record |= {k.replace(before, after, 1): v for k, v in of_set.metrics.items()}
                self._tell(of_set.metrics)
                self._event("on_evaluate", of_set.metrics)
                metrics |= of_set.metrics
        if self.tracker is not None:
            self.tracker.log_eval(record)
            self.progress.evaluations += 1
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """`evaluate` one set, and return the predictions, too: the student's logits on the
        references (what `preprocess_logits_for_metrics` makes of them) or, with
        `predict_with_generate`, what it writes. Collective.
        """
        self._memory_tracker.start()
        self._read_fields()
        sets = self.inputs.tokenize_evaluation({"": test_dataset})
        with self.engines() as pipeline:
            pipeline.try_rows(self.inputs.lengths.with_sets(self.args, sets))
            output = self._evaluate_set(sets[""], metric_key_prefix, returned=True)
        self._memory_tracker.stop_and_update_metrics(output.metrics)
        self._event("on_predict", output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def _evaluate_set(
        self, examples: Examples, prefix: str, returned: bool = False
    ) -> EvalLoopOutput:
        wanted = Wanted(
            self.compute_metrics,
            self.preprocess_logits_for_metrics,
            on_step=lambda: self._event("on_prediction_step"),
            returned=returned,
        )
        self.callback_handler.eval_dataloader = self._eval_loader(examples)
        return evaluation.evaluate(self.pipeline, examples, self.args, prefix, wanted)

    def formula(self) -> Formula | None:
        """What a subclass has put in the place of generalized_jsd_loss."""
        if self.generalized_jsd_loss is trl.generalized_jsd_loss:
            return None
        return trl.formula_of(self.generalized_jsd_loss, self.inputs.vocabulary)


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
