"""GKDTrainer: wires the parts, runs windows, evaluates, saves. TRL's name, arguments and methods.

trainer = GKDTrainer(model="student", teacher_model="teacher", args=GKDConfig(output_dir="run"),
                     train_dataset=dataset)
trainer.train()
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

from gkd_ds.checkpoint import engine_files, export, resharding, store
from gkd_ds.checkpoint.progress import TRAINER_STATE, Mean, Progress, check_state, differences
from gkd_ds.config.config import GKDConfig
from gkd_ds.config.paths import open_anew
from gkd_ds.data.examples import Examples, tokenize
from gkd_ds.data.schedule import SampleOrder, StepScheduler
from gkd_ds.data.tokenizer import stop_token_ids
from gkd_ds.engine import loading, zero
from gkd_ds.learn import trl
from gkd_ds.learn.student import Student
from gkd_ds.monitor.evaluation import evaluate, metric_names
from gkd_ds.monitor.guards import BadUpdates, trimmed, warnings
from gkd_ds.monitor.metrics import rollout_records, suspects, update_record, window_stats
from gkd_ds.monitor.tracker import Tracker
from gkd_ds.pipeline import Pipeline, count_tokens
from gkd_ds.records import Sample
from gkd_ds.rollout.decoding import Sampling
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.exit_codes import FAILED, FINISHED, NOT_SAVED, STOPPED
from gkd_ds.runtime.interrupts import Interrupts, StopAgreed
from gkd_ds.runtime.launcher import check_hostfile
from gkd_ds.runtime.provenance import library_versions
from gkd_ds.runtime.watchdog import Watchdog
from gkd_ds.teacher.streamed import Teacher

logger = logging.getLogger(__name__)

FINISHED_FILE = "FINISHED"


class GKDTrainer:
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
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        check_hostfile()
        self.args = config = args if args is not None else GKDConfig()
        # The time budget includes loading, and a stop file that appears meanwhile counts.
        self.interrupts = Interrupts(config.stop_path, config.max_runtime)
        student = loading.require_causal_lm(
            model if model is not None else config.model_name_or_path, "student"
        )
        teacher = teacher_model if teacher_model is not None else config.teacher_model_name_or_path
        teacher = loading.require_causal_lm(teacher, "teacher")
        loading.refuse_ignored(
            student, "student", model_init_kwargs=config.model_init_kwargs, dtype=config.dtype
        )
        loading.refuse_ignored(
            teacher, "teacher", teacher_model_init_kwargs=config.teacher_model_init_kwargs
        )
        config.validate_files()
        loading.require_safetensors(student, config.model_init_kwargs)
        loading.require_safetensors(teacher, config.teacher_model_init_kwargs)
        self.processing_class = loading.load_tokenizer(student, processing_class, config)
        loading.generation_config(
            teacher, config.teacher_model_init_kwargs
        )  # only whether it can be read
        own = loading.generation_config(student, config.model_init_kwargs)
        self._stop_ids = stop_token_ids(self.processing_class, own)
        self._train_examples = self._tokenize(
            train_dataset, config.dataset_name or "the training data"
        )
        self._eval_examples = self._tokenize_eval(eval_dataset)
        self._refuse_impossible_evaluation()
        self._vocabulary = loading.shared_vocabulary(
            student, teacher, self.processing_class, config
        )
        for examples in (self._train_examples, *self._eval_examples.values()):
            loading.require_known_tokens(examples, self._vocabulary)

        if config.log_level != "passive":
            logging.getLogger("gkd_ds").setLevel(config.log_level.replace("detail", "info").upper())
        zero.start(config)
        self._refuse_different_ranks()
        torch.manual_seed(config.seed)
        self.state = self._initial_state()
        self.counters = zero.Counters()
        self.watchdog = Watchdog(config.watchdog_timeout, config.output_dir)
        self._names = {"student": loading._name(student), "teacher": loading._name(teacher)}
        self.pipeline = self._build_pipeline(student, teacher, optimizers)
        self.model = self.pipeline.student.model
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *(callbacks or [])],
            self.model,
            self.processing_class,
            self.pipeline.student.engine.optimizer,
            self.pipeline.student.engine.lr_scheduler,
        )
        self.control = self.callback_handler.on_init_end(config, self.state, self.control)
        self.tracker: Tracker | None = None
        self.stop_reason: str | None = None
        self.exit_code = FINISHED  # of the last train(); exit_codes.py explains it

    # -- building
    # --------------------------------------------------------------------------------------

    def _tokenize(self, dataset: Any, where: str) -> Examples | None:
        if dataset is None:
            return None
        return tokenize(dataset, self.processing_class, self.args, where, self._stop_ids)

    def _tokenize_eval(self, dataset: Any) -> dict[str, Examples]:
        """Evaluation sets by name; a single one has the empty name."""
        if dataset is None:
            return {}
        sets = dataset if isinstance(dataset, dict) and "messages" not in dataset else {"": dataset}
        return {
            name: self._tokenize(rows, f"the evaluation data {name}".rstrip())
            for name, rows in sets.items()
        }

    def _refuse_impossible_evaluation(self) -> None:
        config = self.args
        if config.eval_strategy == "no" and not config.eval_on_start:
            return
        if not self._eval_examples:
            asked = (
                "eval_on_start is set"
                if config.eval_on_start
                else f"eval_strategy is {config.eval_strategy.value}"
            )
            raise InputError(
                f"{asked} but no eval_dataset is given; pass one to GKDTrainer, or switch "
                "evaluation off."
            )
        if config.metric_for_best_model is not None:
            prefixes = [f"eval_{name}_" if name else "eval_" for name in self._eval_examples]
            self._find_metric(
                {prefix + name: None for prefix in prefixes for name in metric_names(config)}
            )

    def _find_metric(self, metrics: dict[str, Any]) -> Any:
        """The one of `metrics` that metric_for_best_model names."""
        name = self.args.metric_for_best_model
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            raise InputError(
                f"metric_for_best_model {name!r} is none of {', '.join(metrics)}; name one of them."
            )
        return metrics[key]

    def _refuse_different_ranks(self) -> None:
        fields = {
            name: repr(value) for name, value in self.args.to_dict().items() if name != "local_rank"
        }
        ranks.refuse_differences(fields, "configuration")
        files = zip(("deepspeed", "teacher_deepspeed"), self.args.read_deepspeed_files())
        digests = {
            f"what {name} holds": hashlib.sha256(repr(file).encode()).hexdigest()
            for name, file in files
        }
        ranks.refuse_differences(digests, "DeepSpeed files")
        ranks.refuse_differences(library_versions(), "library versions")
        data = {"training data": self._train_examples, **self._eval_examples}
        ranks.refuse_differences(
            {name: rows.fingerprint for name, rows in data.items() if rows is not None}, "data"
        )

    def _initial_state(self) -> TrainerState:
        config = self.args
        samples = len(self._train_examples) if self._train_examples is not None else 1
        self.scheduler = StepScheduler(
            num_samples=samples,
            micro_batch_size=config.per_device_train_batch_size,
            micro_batches=config.gradient_accumulation_steps,
            world_size=ranks.world_size(),
            seed=config.seed,
            lmbda=config.lmbda,
            seq_kd=config.seq_kd,
            drop_last=config.dataloader_drop_last,
        )
        self.order = SampleOrder(
            samples, config.seed if config.data_seed is None else config.data_seed
        )
        by_epochs = math.ceil(config.num_train_epochs * self.scheduler.windows_per_epoch)
        state = TrainerState(
            max_steps=config.max_steps if config.max_steps > 0 else by_epochs,
            num_train_epochs=math.ceil(config.num_train_epochs),
            train_batch_size=config.per_device_train_batch_size,
            is_local_process_zero=os.environ.get("LOCAL_RANK", "0") == "0",
            is_world_process_zero=ranks.rank() == 0,
        )
        state.compute_steps(config, state.max_steps)
        state.eval_steps = state.eval_steps or state.logging_steps
        return state

    def _build_pipeline(self, student, teacher, optimizers: tuple) -> Pipeline:
        config = self.args
        # Padding is told by position, so any token will do where the models have no row for the pad
        # token.
        pad_id = (
            self.processing_class.pad_token_id
            if self.processing_class.pad_token_id < self._vocabulary
            else 0
        )
        teacher_model = loading.load_teacher(teacher, config)
        self.teacher = Teacher(teacher_model, config, self._vocabulary, pad_id, self.counters)
        student_model = loading.load_student(student, config, ranks.world_size())
        total = self.state.max_steps
        self.student = Student(
            student_model, config, self._vocabulary, total, self.counters, optimizers
        )
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            stop_ids=tuple(self._stop_ids),
            pad_id=pad_id,
            vocabulary=self._vocabulary,
            max_length=config.max_length,
        )
        return Pipeline(self.student, self.teacher, config, sampling, self.watchdog)

    # -- training
    # --------------------------------------------------------------------------------------

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
        if self._train_examples is None:
            raise InputError("no train_dataset is given; pass one to GKDTrainer.")
        config, handler = self.args, self.callback_handler
        resume = (
            config.resume_from_checkpoint
            if resume_from_checkpoint is None
            else resume_from_checkpoint
        )
        _refuse_occupied(config, resume)
        self.watchdog = self.pipeline.watchdog = Watchdog(
            config.watchdog_timeout, config.output_dir
        )
        with self.interrupts, store.only_run(config.output_dir), self.watchdog:
            exit_code, self.stop_reason = FAILED, None
            try:
                self._begin(resume)
                self.control = handler.on_train_begin(config, self.state, self.control)
                try:
                    self._run()
                except StopAgreed as stop:
                    self.stop_reason = str(stop)
                metrics = self._log_summary()
                self.control = handler.on_train_end(config, self.state, self.control)
                saved = self._end()
                exit_code = self.exit_code = (
                    NOT_SAVED if not saved else STOPPED if self.stop_reason else FINISHED
                )
            finally:
                if self.tracker is not None:
                    self.tracker.close(exit_code)
            zero.print_communication()
            ranks.barrier()
            zero.leave_at_exit()
        return TrainOutput(self.state.global_step, self.progress.train_loss.value, metrics)

    def _begin(self, resume: bool | str | None) -> None:
        config, run_dir = self.args, Path(self.args.output_dir)
        found, passed_over = store.find(run_dir, resume, lambda: self.watchdog.beat("resume"))
        if found is None and config.overwrite_output_dir:
            _agreed(lambda: _clear(run_dir))
        if found is not None:
            self._check(found)
        self._started, self._rollouts, self._learned = time.monotonic(), [], None
        self.progress = Progress(
            BadUpdates(config.max_bad_updates), evaluation_due=config.eval_on_start
        )
        _agreed(lambda: self._open_tracker(found.state["tracker_run_id"] if found else None))
        for _, reason in passed_over:
            self.tracker.say(f"resume: passed over {reason}")
        if found is not None:
            self._resume(found)
        _agreed(lambda: self._prepare_run_dir(is_new=found is None))

    def _open_tracker(self, run_id: str | None) -> None:
        self.tracker = Tracker(
            self.args, ranks.rank(), self.args.output_dir, self.state.max_steps, run_id
        )

    def _prepare_run_dir(self, is_new: bool) -> None:
        """What the directory says is what the run has done."""
        if ranks.rank() == 0:
            Path(self.args.output_dir, FINISHED_FILE).unlink(missing_ok=True)
            with open_anew(Path(self.args.output_dir, "config.resolved.json")) as file:
                file.write(self.args.to_json_string())
        self.tracker.truncate(
            *((-1, None) if is_new else (self.state.global_step, self.progress.evaluations))
        )

    def _run(self) -> None:
        """Windows, epoch by epoch. Raises StopAgreed, on all ranks, when something asks the run to
        stop.
        """
        self._act()  # an evaluation may be due from the start, or since the run was interrupted
        while self.state.global_step > self.progress.epoch_ended_at or self._goes_on():
            self._epoch()

    def _epoch(self) -> None:
        """What is left of an epoch, with the events of transformers' TrainerCallback in
        transformers' order.
        """
        config, handler, state = self.args, self.callback_handler, self.state
        windows, is_open = (
            self.scheduler.windows_per_epoch,
            state.global_step > self.progress.epoch_ended_at,
        )
        end = ((state.global_step - is_open) // windows + 1) * windows
        self.control = handler.on_epoch_begin(config, state, self.control)
        while state.global_step < end and self._goes_on():
            self.control = handler.on_step_begin(config, state, self.control)
            self._window(state.global_step)
            state.global_step += 1
            state.epoch = state.global_step / windows
            self.control = handler.on_step_end(config, state, self.control)
            self._act()
            self.interrupts.raise_if_stop_requested()
            if self.control.should_epoch_stop and self.progress.told.allow(
                "should_epoch_stop", state.global_step
            ):
                self.tracker.say(
                    "should_epoch_stop is ignored: the step alone says where in the data a run is"
                )
        self.control = handler.on_epoch_end(config, state, self.control)
        self.progress.epoch_ended_at = state.global_step
        self._act()
        self.interrupts.raise_if_stop_requested()

    def _window(self, step: int) -> None:
        """rollout -> score -> learn -> update, and one row of metrics.

        A stop abandons the window before its gradients are computed. After that, the update is all
        that is left.
        """
        config, handler = self.args, self.callback_handler
        started, counted = time.perf_counter(), dataclasses.replace(self.counters)
        samples, sources = self._samples(step)
        with self.pipeline.interruptible(
            lambda: self.interrupts.raise_if_stop_requested(between_windows=False)
        ):
            rollouts = self.pipeline.rollout(samples, sources)
            total_tokens = count_tokens(rollouts)
            targets = self.pipeline.score(rollouts)
            torch.manual_seed(
                config.seed + step
            )  # dropout, where it is on, does not depend on what ran before
            learned = self.pipeline.learn(rollouts, targets, total_tokens)
        rate = self.student.learning_rate
        self.control = handler.on_pre_optimizer_step(config, self.state, self.control)
        with self.pipeline.phase("update"):
            applied = self.student.update()
        self.control = handler.on_optimizer_step(config, self.state, self.control)

        row = update_record(rollouts, learned, self.pipeline, self.counters, counted)
        bad = None if applied else _what_was_bad(row)
        row |= {
            "step": step + 1,
            "epoch": (step + 1) / self.scheduler.windows_per_epoch,
            "lr": rate,
        }
        row |= {"grad_norm": self.student.grad_norm, "skipped": int(not applied)}
        row["perf/step_s"] = time.perf_counter() - started
        self._rollouts, self._learned = rollouts, learned
        self.tracker.log_update(row)
        if bad:
            self.tracker.log_rollouts(
                step + 1, suspects(rollouts, learned, self.processing_class, 2)
            )
        self._remember(row, bad)

    def _remember(self, row: dict[str, Any], bad: str | None) -> None:
        """Keep of a window what later ones and the log need; warn of what goes wrong."""
        progress = self.progress
        progress.evaluations = 0
        progress.last_update = {
            "grad_norm": row["grad_norm"],
            "learning_rate": row["lr"],
            "epoch": row["epoch"],
        }
        if bad is None:
            progress.train_loss.add(row["loss"])
        if math.isfinite(row["loss"]) or not self.args.logging_nan_inf_filter:
            progress.unlogged_loss.add(row["loss"])
        if sentence := progress.bad_updates.record(row["step"], bad):
            self.tracker.say(sentence)
        if row["source"]["student"]:
            progress.history = trimmed([*progress.history, window_stats(row)])
        for sentence in warnings(progress.history, progress.told):
            self.tracker.say(sentence)

    def _samples(self, step: int) -> tuple[list[Sample], set]:
        """This rank's samples of a window, and the sources that the whole window uses."""
        epoch, scheduler = self.scheduler.epoch_of(step), self.scheduler
        if self._order_of != epoch:
            self._order_of, self._permutation = epoch, self.order.permutation(epoch)
        samples = []
        for micro_batch in range(scheduler.micro_batches):
            for place in scheduler.rows(step, micro_batch, ranks.rank()):
                row, examples = int(self._permutation[place]), self._train_examples
                sample_id, source = (
                    epoch * scheduler.num_samples + row,
                    scheduler.source_at(step, place),
                )
                samples.append(
                    Sample(
                        sample_id, examples.prompt_ids[row], examples.completion_ids[row], source
                    )
                )
        return samples, scheduler.sources(step)

    _order_of = -1

    # -- what callbacks may ask for
    # -----------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """Whether there are windows left, and no callback wants the run to end on any rank. A
        collective.
        """
        self.control.should_training_stop = ranks.any_rank(self.control.should_training_stop)
        return (
            self.state.global_step < self.state.max_steps and not self.control.should_training_stop
        )

    def _act(self) -> None:
        """Log, evaluate and save as `control` says, on all ranks when it says so on any.

        Each is agreed just before it is done, since what comes before may ask for it: the best
        model so far is known, and saved, after the evaluation. A stop may come before the
        evaluation is through: it is due then.
        """
        if ranks.any_rank(self.control.should_log):
            self._log()
        if ranks.any_rank(self.control.should_evaluate) and self._eval_examples:
            self.progress.evaluation_due = True
        if self.progress.evaluation_due:
            self._evaluate_and_log()
        if ranks.any_rank(self.control.should_save):
            self._save_checkpoint(self.args.save_only_model)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _log(self) -> None:
        """Tell the mean loss since this was done last; nothing if that was after the same
        update.
        """
        config, progress = self.args, self.progress
        if not progress.last_update:
            return
        logs = {"loss": progress.unlogged_loss.value, **progress.last_update}
        progress.unlogged_loss, progress.last_update = Mean(), {}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        rows = rollout_records(
            self._rollouts, self._learned, self.processing_class, config.log_rollouts
        )
        self.tracker.log_rollouts(self.state.global_step, rows)
        self.control = self.callback_handler.on_log(config, self.state, self.control, logs)

    def _log_summary(self) -> dict[str, float]:
        """What transformers tells callbacks about a run when it ends."""
        seconds = time.monotonic() - self._started
        loss, epoch = self.progress.train_loss.value, self.state.epoch or 0.0
        metrics = {"train_runtime": seconds, "train_loss": loss, "epoch": epoch}
        if not self.stop_reason:  # the history goes on after the checkpoint that is saved next
            self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_and_log(self) -> None:
        with self.pipeline.interruptible(
            lambda: self.interrupts.raise_if_stop_requested(between_windows=False)
        ):
            metrics = self.evaluate()
        self.progress.evaluation_due = False
        if self.args.metric_for_best_model is None:
            return
        value = self._find_metric(metrics)
        best = self.state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save |= self.args.save_strategy == "best"

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out divergence (evaluate.py) of `eval_dataset`, by default the one given to the
        trainer. Collective.

        Returns `<prefix>_loss`, `<prefix>_on_policy_loss`, ...; with several sets
        `<prefix>_<name>_loss`.
        """
        sets = self._eval_examples if eval_dataset is None else self._tokenize_eval(eval_dataset)
        if not sets:
            raise InputError("no eval_dataset is given; pass one to GKDTrainer or to evaluate().")
        metrics: dict[str, float] = {}
        for name, examples in sets.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            values = evaluate(self.pipeline, examples, self.args)
            metrics |= {f"{prefix}_{key}": value for key, value in values.items()}
        if self.tracker is not None:
            step, row = self.state.global_step, {}
            for key, value in metrics.items():
                row[key.replace(f"{metric_key_prefix}_", f"{metric_key_prefix}/", 1)] = value
            self.tracker.log_eval({"step": step, **row})
            self.progress.evaluations += 1
        self.state.log_history.append(
            {**metrics, "step": self.state.global_step, "epoch": self.state.epoch}
        )
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # -- saving
    # --------------------------------------------------------------------------------------

    def _save_checkpoint(self, only_model: bool) -> Path | None:
        """A checkpoint of this step; None (and a sentence) when it could not be written. Training
        goes on then.
        """
        config, run_dir, step = self.args, self.args.output_dir, self.state.global_step
        heartbeat = lambda: self.watchdog.beat("save")  # noqa: E731
        heartbeat()
        self.tracker.sync()
        state = {
            "trainer_state": {
                **dataclasses.asdict(self.state),
                "log_history": self.state.log_history,
            },
            "progress": dataclasses.asdict(self.progress),
            "tracker_run_id": self.tracker.run_id,
            "config": config.to_dict(),
            "schedule": {**self._schedule(), "draw_samples": self.scheduler.draw_samples},
        }
        try:
            if only_model:
                path = store.save(run_dir, step, self._export, state, heartbeat)
            else:

                def write(directory: Path) -> None:
                    engine_files.save_engine(self.student.engine, directory, heartbeat=heartbeat)

                path = store.save(run_dir, step, write, state, heartbeat)
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return None
        best = self.state.best_global_step
        store.prune(run_dir, config.save_total_limit, f"checkpoint-{best}" if best else None)
        ranks.barrier()
        self._note_best_checkpoint()
        self._saved_step = None if only_model else step
        if config.push_to_hub and config.hub_strategy != "end":
            self.save_model()
            self._push(f"Training in progress, step {step}", blocking=False, checkpoint=path.name)
        self.control = self.callback_handler.on_save(config, self.state, self.control)
        return path

    _saved_step: int | None = None  # of the last checkpoint from which a run can go on

    def _note_best_checkpoint(self) -> None:
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _schedule(self) -> dict[str, Any]:
        """What decides which samples a window holds; a resume must agree on it."""
        names = ("num_samples", "window_samples", "seed", "drop_last")
        schedule = {name: getattr(self.scheduler, name) for name in names}
        return schedule | {
            "data_seed": self.order.seed,
            "training data": self._train_examples.fingerprint,
        }

    def _check(self, found: store.Manifest) -> None:
        """Raise InputError unless this run can go on from a checkpoint, as far as its manifest
        tells.
        """
        check_state(found)
        for name, value in self._schedule().items():
            before = found.state["schedule"][name]
            if value != before:
                raise InputError(
                    f"cannot resume from {found.path}: its {name} was {before} and is now {value}; "
                    "start with the same "
                    "data, seeds and global batch (batch size x accumulation x ranks)."
                )

    def _resume(self, found: store.Manifest) -> None:
        # With another layout of the same window, the draws stay those of the layout in which the
        # run began.
        draw_samples = found.state["schedule"]["draw_samples"]
        self.scheduler = dataclasses.replace(self.scheduler, draw_samples=draw_samples)
        self._load_engine(found)
        saved = found.state["trainer_state"]
        for name in TRAINER_STATE:
            setattr(self.state, name, saved[name])
        self._note_best_checkpoint()
        self.progress = Progress.of(found.state["progress"], self.args)
        self.tracker.say(f"resumed from {found.path} at step {self.state.global_step}")
        for sentence in differences(found, self.args):
            self.tracker.say(sentence)

    def _load_engine(self, found: store.Manifest) -> None:
        engine, world = self.student.engine, ranks.world_size()
        if found.world_size == world:
            engine_files.load_engine(engine, found.path, lambda: self.watchdog.beat("resume"))
        else:
            self.tracker.say(
                f"{found.path} was written by {found.world_size} ranks; resharding it for {world}"
            )
            resharding.load_engine(engine, found.path, found.world_size, ranks.rank(), world)

    def _end(self) -> bool:
        """After the last window: a checkpoint if the run was stopped early, the finished student
        otherwise. False if that could not be written.
        """
        if self.stop_reason:
            # save_only_model does not count: the run is to go on from here.
            path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            if self.state.global_step != self._saved_step:
                path = self._save_checkpoint(only_model=False)
            saved = (
                f"its state is in {path}; resume_from_checkpoint=auto continues"
                if path
                else "it was not saved"
            )
            self.tracker.say(
                f"stopped after update {self.state.global_step}: {self.stop_reason}; {saved}"
            )
            return path is not None
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            found, _ = store.find(self.args.output_dir, best)
            self._load_engine(found)
        try:
            self.save_model()
            self._mark_finished()
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return False
        if self.args.push_to_hub:
            self._push("End of training")
        return True

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the student as a Hugging Face directory (default: output_dir). Collective.

        Raises store.CheckpointError, on all ranks, when it could not be written.
        """
        directory = Path(output_dir or self.args.output_dir)
        ranks.run_on_all_ranks(
            lambda: self._export(directory),
            store.failure(f"the student was not written to {directory}"),
        )

    def _mark_finished(self) -> None:
        path = Path(self.args.output_dir, FINISHED_FILE)

        def mark() -> None:
            if ranks.rank() == 0:
                with open_anew(path) as file:
                    file.write(f"{self.state.global_step}\n")

        ranks.run_on_all_ranks(mark, store.failure(f"{path} was not written"))

    def _export(self, directory: Path) -> None:
        state_dict = zero.full_state_dict(self.student.engine, self.model)
        if ranks.rank() == 0:
            export.export_model(
                self.model,
                state_dict,
                self.processing_class,
                self.model.generation_config,
                directory,
                self._card(),
            )

    def _card(self) -> dict[str, Any]:
        return {
            **self._names,
            "dataset": self.args.dataset_name,
            "data_fingerprint": self._train_examples.fingerprint
            if self._train_examples is not None
            else None,
            "config": self.args.to_dict(),
            "step": self.state.global_step,
            "metrics": next(
                (entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), None
            ),
        }

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
        if ranks.rank() != 0:
            return None
        config = dataclasses.replace(
            self.args,
            hub_token=token or self.args.hub_token,
            hub_revision=revision or self.args.hub_revision,
        )
        if card:
            export.write_card(config.output_dir, {**self._card(), **card})
        return export.push_to_hub(config.output_dir, config, commit_message, blocking)

    def _push(self, message: str, **options: Any) -> None:
        """A push that fails loses nothing: the model is in output_dir, and rank 0 says what went
        wrong.
        """
        self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if ranks.rank() != 0:
            return
        try:
            export.push_to_hub(self.args.output_dir, self.args, message, **options)
        except RuntimeError as error:
            self.tracker.say(str(error))

    # -- small things of transformers' Trainer
    # ------------------------------------------------------------------

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


def _refuse_unsupported(**arguments: Any) -> None:
    """Refuse by name what TRL's trainer takes and this one does not yet."""
    for name, value in arguments.items():
        if value is not None:
            raise InputError(f"GKDTrainer does not support {name} yet; leave it out.")


def _refuse_occupied(config: GKDConfig, resume: bool | str | None) -> None:
    """Refuse an output_dir that training would write over. A collective: rank 0 looks, before it
    writes anything.
    """
    ranks.run_on_all_ranks(
        lambda: config.check_output_dir_is_free(resume) if ranks.rank() == 0 else None,
        catch=InputError,
    )


def _what_was_bad(row: dict[str, Any]) -> str:
    if not math.isfinite(row["teacher_logprob"]):
        return "teacher targets"
    return "gradients" if math.isfinite(row["loss"]) else "loss"


def _clear(run_dir: Path) -> None:
    """Remove the checkpoints of the run that overwrite_output_dir gives up. Rank 0 works."""
    for path in run_dir.glob("checkpoint-*") if ranks.rank() == 0 else ():
        if store.COMPLETE_NAME.fullmatch(path.name) or store.LEFTOVER_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def _agreed(work: Callable[[], None]) -> None:
    """Do `work` in output_dir, or raise the same InputError on all ranks when the system refuses it
    to one.
    """

    def failure(rank: int, error: OSError) -> InputError:
        what = f"{error.filename or 'output_dir'} cannot be written ({error.strerror})"
        return InputError(f"{what}; make room for it or choose another output_dir.")

    ranks.run_on_all_ranks(work, failure, catch=OSError)
