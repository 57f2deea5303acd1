"""A run is windows: the loop, and what callbacks may ask for between two windows.

GKDTrainer (trainer.py) is this loop under TRL's name and with TRL's methods.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
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

from gkd_ds.checkpoint import store
from gkd_ds.checkpoint.progress import Progress
from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.checkpoint.run_lock import only_run
from gkd_ds.checkpoint.session import Session, refuse_occupied
from gkd_ds.data.windows import Windows
from gkd_ds.engine import process
from gkd_ds.engine.inputs import Inputs
from gkd_ds.monitor.evaluation import metric_for_best_model
from gkd_ds.monitor.guards import trimmed, warnings
from gkd_ds.monitor.metrics import (
    rollout_records,
    suspects,
    update_record,
    what_was_bad,
    window_stats,
)
from gkd_ds.monitor.tracker import Tracker
from gkd_ds.pipeline import Learned, Pipeline, count_tokens
from gkd_ds.records import Rollout
from gkd_ds.runtime import ranks
from gkd_ds.runtime.exit_codes import FAILED, FINISHED, NOT_SAVED, STOPPED
from gkd_ds.runtime.interrupts import Interrupts, StopAgreed
from gkd_ds.runtime.watchdog import Watchdog


class WindowLoop(ABC):
    """Runs the windows of `inputs` through `pipeline`, tells `callbacks`, evaluates and saves."""

    def __init__(
        self,
        inputs: Inputs,
        windows: Windows,
        state: TrainerState,
        pipeline: Pipeline,
        interrupts: Interrupts,
        callbacks: list[TrainerCallback],
    ):
        self.inputs, self.windows, self.state = inputs, windows, state
        self.pipeline, self.interrupts = pipeline, interrupts
        self.args, self.processing_class = inputs.config, inputs.tokenizer
        self.student, self.teacher = pipeline.student, pipeline.teacher
        self.model = self.student.adapter or self.student.model
        self.publisher = Publisher(inputs, self.student, state)
        self.session: Session | None = None  # of the last train()
        self.stop_reason: str | None = None
        self.exit_code = FINISHED  # of the last train()
        self._rollouts: list[Rollout] = []  # of the last window
        self._learned: Learned | None = None
        self.control = TrainerControl()
        engine = self.student.engine
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *callbacks],
            self.model,
            self.processing_class,
            engine.optimizer,
            engine.lr_scheduler,
        )
        self._event("on_init_end")

    def run(self, resume: bool | str | None) -> TrainOutput:
        """What `train` does; `resume` replaces the field `resume_from_checkpoint`."""
        config = self.args
        refuse_occupied(config, resume)
        self.publisher.refuse_unwritable()
        watchdog = self.pipeline.watchdog = Watchdog(config.watchdog_timeout, config.output_dir)
        self.session = Session(
            config, self.student, self.state, self.windows, self.publisher, watchdog
        )
        self._rollouts, self._learned = [], None
        with self.interrupts, only_run(config.output_dir), watchdog:
            exit_code, self.stop_reason = FAILED, None
            try:
                self.session.begin(resume)
                self._event("on_train_begin")
                try:
                    self._windows()
                except StopAgreed as stop:
                    self.stop_reason = str(stop)
                metrics = self._log_summary()
                self._event("on_train_end")
                saved = self._end()
                reached = STOPPED if self.stop_reason else FINISHED
                exit_code = self.exit_code = reached if saved else NOT_SAVED
            finally:
                if self.tracker is not None:
                    self.tracker.close(exit_code)
            process.print_communication()
            ranks.barrier()
            process.leave_at_exit()
        return TrainOutput(self.state.global_step, self.progress.train_loss.value, metrics)

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Evaluate on the trainer's sets, tell the callbacks, return the metrics. A collective."""

    @abstractmethod
    def save_model(self) -> None:
        """Write the student to output_dir. A collective; raises CheckpointError on all ranks."""

    @property
    def tracker(self) -> Tracker | None:
        """What tells the world about the run; None before the first `train()`."""
        return self.session.tracker if self.session is not None else None

    @property
    def progress(self) -> Progress:
        """What the run remembers beside weights and `state`."""
        return self.session.progress

    def _windows(self) -> None:
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
        state, windows = self.state, self.windows.scheduler.windows_per_epoch
        is_open = state.global_step > self.progress.epoch_ended_at
        end = ((state.global_step - is_open) // windows + 1) * windows
        self._event("on_epoch_begin")
        while state.global_step < end and self._goes_on():
            self._event("on_step_begin")
            self._window(state.global_step)
            state.global_step += 1
            state.epoch = state.global_step / windows
            self._event("on_step_end")
            self._act()
            self.interrupts.raise_if_stop_requested()
            if self.control.should_epoch_stop and self.progress.told.allow(
                "should_epoch_stop", state.global_step
            ):
                self.tracker.say(
                    "should_epoch_stop is ignored: the step alone says where in the data a run is"
                )
        self._event("on_epoch_end")
        self.progress.epoch_ended_at = state.global_step
        self._act()
        self.interrupts.raise_if_stop_requested()

    def _window(self, step: int) -> None:
        """rollout -> score -> learn -> update, and one record of metrics.

        A stop abandons the window before its gradients are computed. After that, the update is all
        that is left.
        """
        started, counted = time.perf_counter(), dataclasses.replace(self.pipeline.counters)
        samples, sources = self.windows.samples(step, ranks.rank())
        with self._interruptible():
            rollouts = self.pipeline.rollout(samples, sources)
            total_tokens = count_tokens(rollouts)
            targets = self.pipeline.score(rollouts)
            # Dropout, where it is on, does not depend on what ran before.
            torch.manual_seed(self.args.seed + step)
            learned = self.pipeline.learn(rollouts, targets, total_tokens)
        rate = self.student.learning_rate
        self._event("on_pre_optimizer_step")
        with self.pipeline.phase("update"):
            applied = self.student.update()
        self._event("on_optimizer_step")

        record = update_record(rollouts, learned, self.pipeline, counted)
        bad = None if applied else what_was_bad(record)
        epoch = (step + 1) / self.windows.scheduler.windows_per_epoch
        record |= {"step": step + 1, "epoch": epoch, "lr": rate}
        record |= {"grad_norm": self.student.grad_norm, "skipped": int(not applied)}
        record["perf/step_s"] = time.perf_counter() - started
        self._rollouts, self._learned = rollouts, learned
        self.tracker.log_update(record)
        if bad:
            told = suspects(rollouts, learned, self.processing_class, 2)
            self.tracker.log_rollouts(step + 1, told)
        self._remember(record, bad)

    def _remember(self, record: dict[str, Any], bad: str | None) -> None:
        """Keep of a window what later ones and the log need; warn of what goes wrong."""
        progress = self.progress
        progress.note_update(record, bad, self.args.logging_nan_inf_filter)
        if sentence := progress.bad_updates.record(record["step"], bad):
            self.tracker.say(sentence)
        if record["source"]["student"]:
            progress.history = trimmed([*progress.history, window_stats(record)])
        for sentence in warnings(progress.history, progress.told):
            self.tracker.say(sentence)

    # -- what callbacks may ask for ---------------------------------------------------------------

    def _event(self, name: str, *args: Any) -> None:
        """Tell the callbacks of one of transformers' events, and hear what they want."""
        tell = getattr(self.callback_handler, name)
        self.control = tell(self.args, self.state, self.control, *args)

    def _interruptible(self) -> AbstractContextManager[None]:
        """Inside, a stop that was asked for is obeyed before the next phase."""
        return self.pipeline.interruptible(
            lambda: self.interrupts.raise_if_stop_requested(between_windows=False)
        )

    def _goes_on(self) -> bool:
        """Whether there are windows left, and no callback wants the run to end on any rank. A
        collective.
        """
        self.control.should_training_stop = ranks.any_rank(self.control.should_training_stop)
        has_windows = self.state.global_step < self.state.max_steps
        return has_windows and not self.control.should_training_stop

    def _act(self) -> None:
        """Log, evaluate and save as `control` says, on all ranks when it says so on any.

        Each is agreed just before it is done, since what comes before may ask for it: the best
        model so far is known, and saved, after the evaluation. A stop may come before the
        evaluation is through: it is due then.
        """
        if ranks.any_rank(self.control.should_log):
            self._log()
        if ranks.any_rank(self.control.should_evaluate) and self.inputs.evaluation:
            self.progress.evaluation_due = True
        if self.progress.evaluation_due:
            self._evaluate_and_log()
        if ranks.any_rank(self.control.should_save):
            self._save_checkpoint(self.args.save_only_model)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _log(self) -> None:
        """Tell the mean loss since this was done last; nothing if no update came between."""
        logs, step = self.progress.take_unlogged(), self.state.global_step
        if logs is None:
            return
        self.state.log_history.append({**logs, "step": step})
        rollouts = rollout_records(
            self._rollouts, self._learned, self.processing_class, self.args.log_rollouts
        )
        self.tracker.log_rollouts(step, rollouts)
        self._event("on_log", logs)

    def _log_summary(self) -> dict[str, float]:
        """What transformers tells callbacks about a run when it ends."""
        metrics = {
            "train_runtime": time.monotonic() - self.session.started,
            "train_loss": self.progress.train_loss.value,
            "epoch": self.state.epoch or 0.0,
        }
        if not self.stop_reason:  # the history goes on after the checkpoint that is saved next
            self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._event("on_log", metrics)
        return metrics

    def _evaluate_and_log(self) -> None:
        with self._interruptible():
            metrics = self.evaluate()
        self.progress.evaluation_due = False
        if self.args.metric_for_best_model is None:
            return
        value, best = metric_for_best_model(self.args, metrics), self.state.best_metric
        if not math.isfinite(value):
            return
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save |= self.args.save_strategy == "best"

    # -- saving -----------------------------------------------------------------------------------

    def _save_checkpoint(self, only_model: bool) -> Path | None:
        """A checkpoint of this step; None (and a sentence) when it could not be written. Training
        goes on then.
        """
        path = self.session.save(only_model)
        if path is None:
            return None
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self._push_checkpoint(path)
        self._event("on_save")
        return path

    def _push_checkpoint(self, path: Path) -> None:
        """Push the student as it is now; a sentence, and training goes on, when that fails."""
        try:
            self.save_model()
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return
        message = f"Training in progress, step {self.state.global_step}"
        self._push(message, blocking=False, checkpoint=path.name)

    def _end(self) -> bool:
        """After the last window: a checkpoint if the run was stopped early, the finished student
        otherwise, and then the best one in its place. False if that could not be done.
        """
        if self.stop_reason:
            # save_only_model does not count: the run is to go on from here.
            step = self.state.global_step
            path = Path(self.args.output_dir, f"checkpoint-{step}")
            if step != self.session.saved_step:
                path = self._save_checkpoint(only_model=False)
            self.session.say_stopped(self.stop_reason, path)
            return path is not None
        try:
            self.save_model()  # before anything else can go wrong
            if self.session.load_best():
                self.save_model()
            self.session.mark_finished()
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return False
        if self.args.push_to_hub:
            self._push("End of training")
        return True

    def _push(self, message: str, **options: Any) -> None:
        """A push that fails loses nothing: the model is in output_dir, and rank 0 says what went
        wrong.
        """
        self._event("on_push_begin")
        try:
            self.publisher.push(message, **options)
        except RuntimeError as error:
            self.tracker.say(str(error))
