"""What a run tells in transformers' way: its logs, to the history, the callbacks and the trackers.

The trackers get every window and every evaluation from the loop; of a log they are told what a
subclass or a script has added to it.
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import TrainerMemoryTracker, speed_metrics

from gkd_ds.checkpoint.progress import Progress
from gkd_ds.data.windows import Windows
from gkd_ds.monitor.metrics import python_numbers, rollout_records
from gkd_ds.pipeline import Learned
from gkd_ds.records import Rollout
from gkd_ds.saving import Saving


class Logs(Saving):
    """Logs what its loop has done."""

    windows: Windows
    _memory_tracker: TrainerMemoryTracker  # transformers' name for it
    _rollouts: list[Rollout]  # of the last window
    _learned: Learned | None
    _tokens_before = 0  # that were seen before this train()
    _recorded: frozenset[str] = frozenset()  # what the trackers know already of this log

    @property
    def progress(self) -> Progress:
        """What the run remembers beside weights and `state`."""
        return self.session.progress

    def _log(self) -> None:
        """Tell the mean loss since this was done last; nothing if no update came between."""
        logs, step = self.progress.take_unlogged(), self.state.global_step
        if logs is None:
            return
        rollouts = rollout_records(
            self._rollouts, self._learned, self.processing_class, self.args.log_rollouts
        )
        self.tracker.log_rollouts(step, rollouts)
        self._tell(logs, self.session.started)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the history, the callbacks and, of what they do not know yet, the trackers."""
        step, given = self.state.global_step, list(logs)
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                logs |= speed_metrics("train", start_time, num_tokens=self._tokens_learned())
        more = {name: logs[name] for name in given if name not in {"epoch", *self._recorded}}
        if more and self.tracker is not None:
            self.tracker.log_eval({"step": step, **python_numbers(_as_integrations_write(more))})
            self.progress.evaluations += 1
        self.state.log_history.append(python_numbers({**logs, "step": step}))
        self._event("on_log", logs)

    def _tell(self, logs: dict[str, float], *start_time: float) -> None:
        """`log` what the trackers have been told in their own way."""
        self._recorded = frozenset(logs)
        try:
            self.log(logs, *start_time)
        finally:
            self._recorded = frozenset()

    def _log_summary(self) -> dict[str, float]:
        """What transformers tells callbacks about a run when it ends."""
        steps = self.state.global_step - self.session.first_step
        scheduler = self.windows.scheduler
        samples = steps * scheduler.window_samples
        if self.args.max_steps <= 0:  # as transformers counts them
            samples = scheduler.samples_until(self.state.global_step)
            samples -= scheduler.samples_until(self.session.first_step)
        tokens = self._tokens_learned() if self.args.include_tokens_per_second else None
        metrics = speed_metrics("train", self.session.started, samples, steps, tokens)
        metrics |= {
            "total_flos": self.state.total_flos,
            "train_loss": self.progress.train_loss.value,
        }
        if not self._memory_tracker.skip_memory_metrics:
            self._memory_tracker.stop("train")
            self._memory_tracker.update_metrics("train", metrics)
        entries = len(self.state.log_history)
        self._tell(metrics)
        metrics.setdefault("epoch", self.state.epoch or 0.0)
        if self.stop_reason:  # the history goes on after the checkpoint that is saved next
            del self.state.log_history[entries:]
        return metrics

    def _tokens_learned(self) -> int:
        """Tokens of the sequences that this train() has learned from, as the state counts them."""
        return self.state.num_input_tokens_seen - self._tokens_before


def _as_integrations_write(logs: dict[str, Any]) -> dict[str, Any]:
    """The names that transformers' integrations make of those in a log."""
    known = [(f"{mode}_", f"{mode}/") for mode in ("eval", "test", "train")]
    renamed = {}
    for name, value in logs.items():
        before, after = next((pair for pair in known if name.startswith(pair[0])), ("", "train/"))
        renamed[after + name.removeprefix(before)] = value
    return renamed
