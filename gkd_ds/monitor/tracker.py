"""One stream of records: an update or an evaluation goes to metrics.jsonl, to the console, to W&B
and TensorBoard.

    tracker = Tracker(config, rank, run_dir, total_steps=100)
    tracker.log_update({"step": 1, "loss": 0.5, ...})
    tracker.close(exit_code=0)

`metrics.jsonl` is the truth: every record is in it, whole, whatever the other sinks do. Records
hold plain Python numbers, so logging never waits for a device. Every text that leaves through the
tracker has its secrets removed (redaction.py).
"""

import math
import os
import uuid
from pathlib import Path
from typing import Any

from gkd_ds.monitor.console import Console
from gkd_ds.monitor.jsonl import JsonlSink
from gkd_ds.monitor.sinks import Record, Sink
from gkd_ds.monitor.tensorboard_sink import TensorBoardSink
from gkd_ds.monitor.wandb_sink import WandbSink
from gkd_ds.runtime.redaction import redact

SINKS = ("wandb", "tensorboard")  # of report_to; callbacks.py has the others


def reported_to(config: Any) -> list[str]:
    """Where a run reports to besides metrics.jsonl; of `all`, what is installed."""
    if config.report_to != ["all"]:
        return config.report_to
    from transformers.integrations import get_available_reporting_integrations  # costs seconds

    return get_available_reporting_integrations()


class Tracker:
    """What rank 0 tells the world about a run; on every other rank all methods do nothing.

    Args:
        config: GKDConfig; read are report_to, logging_*, disable_tqdm and what its sinks
            read.
        rank: global rank of this process.
        run_dir: directory of the run; gets the files of the sinks.
        total_steps: number of updates of the whole run.
        resume_run_id: `run_id` of the run that is continued, from its checkpoint.

    Attributes:
        run_id: W&B id of the run (also without W&B, so that a resume may turn it on); None on other
            ranks.
        where: where to look at the W&B run: an address or a local directory; None without W&B.
    """

    def __init__(
        self,
        config: Any,
        rank: int,
        run_dir: str | os.PathLike,
        total_steps: int,
        resume_run_id: str | None = None,
    ):
        self._writes = rank == 0
        self._config = config
        self._total = total_steps
        self.run_id: str | None = None
        self.where: str | None = None
        self._sinks: list[Sink] = []
        self._not_shown: list[Record] = []  # updates since the last one that was due
        self._epoch: int | None = None  # of the update before
        if not self._writes:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._files = JsonlSink(run_dir)
        self._console = Console(total_steps, config.disable_tqdm)
        self._sinks = [self._files, self._console]
        self.run_id = resume_run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        names = reported_to(config)
        if "tensorboard" in names:
            self._sinks.append(TensorBoardSink(config, run_dir, self._console.say))
        if "wandb" in names:
            wandb_sink = WandbSink(config, run_dir, self.run_id, self._console.say)
            self._sinks.append(wandb_sink)
            self.run_id, self.where = wandb_sink.run_id, wandb_sink.where

    def log_update(self, record: Record) -> None:
        """Record one optimizer update: `step` (1 for the first), `loss` and other plain numbers,
        None for unknown.
        """
        if not self._writes:
            return
        record = redact(record)
        due = self._is_due(record)
        self._not_shown.append(record)
        shown = _averaged(self._not_shown, self._config.logging_nan_inf_filter)
        for sink in self._sinks:
            sink.log(record, shown, due)
        if due:
            self._not_shown = []

    def log_eval(self, record: Record) -> None:
        """Record one evaluation: `step` (updates done so far) and `eval/...` numbers."""
        record = redact(record)
        for sink in self._sinks:
            sink.log(record, record, due=True)

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Record sampled completions beside what both models think of them.

        Each rollout: prompt, completion, source (texts); teacher_logprob, student_logprob (mean
        log-probability per completion token) and divergence (mean per completion token), in nats,
        None if unknown.
        """
        if not rollouts:
            return
        rollouts = redact(rollouts)
        for sink in self._sinks:
            sink.log_rollouts(step, rollouts)

    def truncate(self, step: int, evaluations: int | None = None) -> None:
        """Forget every record after update `step` (call it once on resume; -1 forgets everything).

        `evaluations` is how many of the evaluations after that very update count (None: all): one
        that came after the checkpoint was written is made again.
        """
        if self._writes:
            for name, lost in self._files.truncate(step, evaluations).items():
                self.say(f"{name}: {lost} unreadable lines were dropped.")

    def sync(self) -> None:
        """Force what was logged onto the disk (call it before a checkpoint is committed)."""
        if self._writes:
            self._files.sync()

    def say(self, message: str) -> None:
        """Print one message on rank 0 without tearing the progress bar."""
        if self._writes:
            self._console.say(message)

    def close(self, exit_code: int = 0) -> None:
        """Finish all sinks; the run failed unless `exit_code` is 0. Safe to call twice."""
        for sink in self._sinks:
            sink.close(exit_code)

    def _is_due(self, record: Record) -> bool:
        """Whether logging_strategy, logging_steps and logging_first_step want it shown."""
        step, strategy, epoch = record["step"], self._config.logging_strategy, record.get("epoch")
        # The first update of this process belongs to the epoch in which it began.
        epoch_before = int((epoch or 0) - 1e-9) if self._epoch is None else self._epoch
        self._epoch = int(epoch or 0)
        if strategy == "no":
            return False
        if step >= self._total or (step == 1 and self._config.logging_first_step):
            return True
        if strategy == "epoch":
            return self._epoch > epoch_before
        every = self._config.logging_steps  # below 1: a share of the run
        every = math.ceil(every * self._total) if every < 1 else int(every)
        return step % max(every, 1) == 0


def _averaged(records: list[Record], only_finite: bool) -> Record:
    """The last record with its losses averaged over `records`: the loss of one window is too noisy
    to show.
    """
    shown = dict(records[-1])
    names = {name for record in records for name in record}
    for name in {name for name in names if name == "loss" or name.startswith("loss/")}:
        values = [record[name] for record in records if record.get(name) is not None]
        values = [value for value in values if math.isfinite(value) or not only_finite]
        shown[name] = sum(values) / len(values) if values else None
    return shown
