"""A run is windows: the loop, and what callbacks may ask for between two windows.

GKDTrainer (trainer.py) is this loop under TRL's name and with TRL's methods.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
)
from transformers.trainer_utils import TrainOutput

from gkd_ds.checkpoint.progress import initial_state
from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.checkpoint.run_lock import only_run
from gkd_ds.checkpoint.session import Session, refuse_occupied
from gkd_ds.config.changes import Fields
from gkd_ds.data.windows import Windows
from gkd_ds.engine import accelerator, process
from gkd_ds.engine.inputs import Inputs
from gkd_ds.logs import Logs
from gkd_ds.monitor.evaluation import key_of_best, metric_for_best_model
from gkd_ds.monitor.guards import trimmed, warnings
from gkd_ds.monitor.metrics import (
    suspects,
    update_record,
    what_was_bad,
    window_stats,
)
from gkd_ds.pipeline import Learned, Pipeline, count_tokens
from gkd_ds.records import Rollout, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.exit_codes import FAILED, FINISHED, NOT_SAVED, STOPPED
from gkd_ds.runtime.interrupts import Interrupts, StopAgreed
from gkd_ds.runtime.watchdog import Watchdog


class WindowLoop(Logs):
    """Runs the windows of `inputs` through the engines, tells `callbacks`, evaluates and saves."""

    def __init__(
        self,
        inputs: Inputs,
        interrupts: Interrupts,
        callbacks: list[TrainerCallback],
        optimizers: tuple = (None, None),
    ):
        super().__init__(inputs, optimizers)
        self.interrupts, self.fields = interrupts, Fields(inputs.config)
        self._restart()
        self.session: Session | None = None  # of the last train()
        self.stop_reason: str | None = None
        self.exit_code = FINISHED  # of the last train()
        self.is_in_train = False
        self._ignore_keys_for_eval: list[str] | None = None
        self._rollouts: list[Rollout] = []  # of the last window
        self._learned: Learned | None = None
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *callbacks],
            self.model,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self._event("on_init_end")

    def _restart(self) -> None:
        """Begin at the first window of what the configuration asks for now."""
        self._begins_anew = False
        self.windows = Windows.of(self.args, self.inputs.train, ranks.world_size())
        self.state = initial_state(self.args, self.windows.scheduler.windows_per_epoch)
        self.publisher = Publisher(self.inputs, self.models, self.state)

    def run(self, resume: bool | str | None) -> TrainOutput:
        """What `train` does; `resume` replaces the field `resume_from_checkpoint`.

        Called again, it begins at the first window once more, with the weights as they are now.
        """
        self._read_fields()
        refuse_occupied(self.args, resume)
        self.publisher.refuse_unwritable()
        if self.session is not None or self._begins_anew:
            self._restart()
            self.renew_engines()
        self._rollouts, self._learned = [], None
        self.state.log_history = []  # a run's own: what was evaluated before it is told already
        self.is_in_train = True
        try:
            with self.engines() as pipeline:
                return self._run(pipeline, resume)
        finally:
            self.is_in_train = False

    def _run(self, pipeline: Pipeline, resume: bool | str | None) -> TrainOutput:
        config = self.args
        watchdog = pipeline.watchdog = Watchdog(config.watchdog_timeout, config.output_dir)
        self.session = Session(
            config, pipeline.student, self.state, self.windows, self.publisher, watchdog
        )
        handler = self.callback_handler
        handler.optimizer, handler.lr_scheduler = self.optimizer, self.lr_scheduler
        with self.interrupts, only_run(config.output_dir), watchdog:
            exit_code, self.stop_reason = FAILED, None
            try:
                self.session.begin(resume)
                self._tokens_before = self.state.num_input_tokens_seen
                Trainer._load_callback_state(self)
                self._event("on_train_begin")
                try:
                    self._windows()
                except StopAgreed as stop:
                    self.stop_reason = str(stop)
                metrics = self._log_summary()
                saved = self._end()
                self._event("on_train_end")
                self._push_finished(saved)
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
    def evaluate(self, ignore_keys: list[str] | None = None) -> dict[str, float]:
        """Evaluate on the trainer's sets, tell the callbacks, return the metrics. A collective."""

    @abstractmethod
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of one forward and backward of `inputs`."""

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
            self._read_fields()
            self._window(state.global_step)
            state.global_step += 1
            state.epoch = self.windows.scheduler.epochs_after(state.global_step)
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

    def _read_fields(self) -> None:
        """Let act what was assigned to fields since this was done last. Raises InputError, on all
        ranks, for what cannot act. A collective.
        """
        if not ranks.any_rank(self._are_touched()):
            return
        changed, *others = ranks.run_on_all_ranks(self._changed_fields, catch=InputError)
        if any(other != changed for other in others):
            names = ", ".join(f"args.{name}" for name in sorted(set(changed).union(*others)))
            raise InputError(f"{names} was not changed alike on all ranks; change it on all.")
        other_lengths = changed.keys() & {"lmbda", "seq_kd", "max_new_tokens", "eval_on_policy"}
        if other_lengths:
            self.inputs.check_rows()
        if self._pipeline is not None:
            if other_lengths:
                self.pipeline.try_rows(self.inputs.lengths)
            self.pipeline.read_fields()
        if self.is_in_train:
            self.state.compute_steps(self.args, self.state.max_steps)
            self.windows.read_fields(self.args)
        else:
            self._begins_anew = True

    def _are_touched(self) -> bool:
        return self.fields.touched()

    def _changed_fields(self) -> dict[str, Any]:
        """As Fields.changed; on one rank alone."""
        return self.fields.changed(self.is_in_train, self._pipeline is not None)

    def _window(self, step: int) -> None:
        """rollout -> score -> learn -> update, and one record of metrics.

        A stop abandons the window before its gradients are computed. After that, the update is all
        that is left.
        """
        started, counted = time.perf_counter(), dataclasses.replace(self.pipeline.counters)
        samples, sources = self.windows.samples(step, ranks.rank())
        drafts = self.session.drafts if Source.STUDENT in sources else None
        if drafts is not None:
            samples = drafts.given_to(samples)
        with self._interruptible():
            rollouts = self.pipeline.rollout(samples, sources)
            total_tokens = count_tokens(rollouts)
            targets = self.pipeline.score(rollouts)
            # Dropout, where it is on, does not depend on what ran before.
            torch.manual_seed(self.args.seed + step)
            learned = self.pipeline.learn(rollouts, targets, total_tokens)
        if drafts is not None:
            drafts.keep(rollouts)
        for _ in range(self.windows.scheduler.filled_micro_batches(step) - 1):
            self._event("on_substep_end")  # they were learned together
        rate = self.student.learning_rate
        self._event("on_pre_optimizer_step")
        with self.pipeline.phase("update"):
            applied = self.student.update()
        self._event("on_optimizer_step")
        accelerator.empty_cache_every(self.args.torch_empty_cache_steps, step + 1)

        seen = torch.empty(learned.padded_tokens, dtype=torch.long, device="meta")
        flops = self.floating_point_ops({"input_ids": seen})
        more = {"flops": flops, "padded_tokens": learned.padded_tokens}
        record, sums = update_record(rollouts, learned, self.pipeline, counted, **more)
        self.state.total_flos += sums["flops"]
        are_all = self.args.include_num_input_tokens_seen == "all"
        self.state.num_input_tokens_seen += int(
            sums["padded_tokens" if are_all else "input_tokens"]
        )
        bad = None if applied else what_was_bad(record)
        epoch = self.windows.scheduler.epochs_after(step + 1)
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
        if self._pipeline is not None and ranks.world_size() == 1:
            self.student.show()
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
            self._save_checkpoint(self.model, None)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _evaluate_and_log(self) -> None:
        entries = len(self.state.log_history)
        try:
            with self._interruptible():
                metrics = self.evaluate(ignore_keys=self._ignore_keys_for_eval)
        except StopAgreed:  # it is made again, all of it
            del self.state.log_history[entries:]
            raise
        self.progress.evaluation_due = False
        if self.args.metric_for_best_model is None:
            return
        value, best = metric_for_best_model(self.args, metrics), self.state.best_metric
        self._note_in_history(value)
        if not math.isfinite(value):
            return
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save |= self.args.save_strategy == "best"

    def _note_in_history(self, value: float) -> None:
        """Keep what `evaluate` of a subclass has added, where the best is looked for later."""
        step, key = self.state.global_step, key_of_best(self.args)
        entries = [entry for entry in self.state.log_history if entry["step"] == step]
        if not any(key in entry for entry in entries):
            self.state.log_history.append({key: value, "step": step})
