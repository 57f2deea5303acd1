"""A run on W&B: online where there is a server and a key, else offline, to be uploaded later.

A script may have begun a run of its own, which is used then, and may go on logging after training:
as with transformers, a run that has not failed stays open until the script, the next run or the end
of the program finishes it. W&B is a courtesy. When it fails, one sentence says so and training goes
on.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gkd_ds.monitor.jsonl import METRICS_FILE
from gkd_ds.monitor.sinks import Record, flat
from gkd_ds.runtime.provenance import provenance
from gkd_ds.runtime.redaction import redact, redact_argv

_left_open: Any = None  # the last run that a sink has begun and not finished


class WandbSink:
    """Records what is due in the W&B run that this process is in, or else in `run_id`, which may
    exist already.

    `config` is a GKDConfig; read are project, run_name and to_dict(). `run_dir` gets W&B's own
    folder. `say` prints one sentence. `where` says where to look at the run: an address or a local
    directory, None when W&B did not start.
    """

    def __init__(self, config: Any, run_dir: Path, run_id: str, say: Callable[[str], None]):
        self._config = config
        self._run_dir = run_dir
        self.run_id = run_id
        self._say = say
        self._run = None
        self.where: str | None = None
        self._start()

    def log(self, record: Record, shown: Record, due: bool) -> None:
        """Record what is shown, when it is due."""
        if due:
            self._log(flat(shown))

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Record the rollouts as a table."""
        if self._run is not None:
            self._log({"step": step, "rollouts": _table(step, rollouts)})

    def close(self, exit_code: int) -> None:
        """Finish a run that has failed, `exit_code` being none of 0; leave any other one open."""
        if self._run is not None and self._run is _left_open and exit_code:
            self._guard(lambda: self._run.finish(exit_code=exit_code), "was not closed properly")
        self._run = None

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        if not self._guard(lambda: self._run.log(values), "stopped recording"):
            self._run = None

    def _start(self) -> None:
        try:
            import wandb
        except ImportError:
            self._say("W&B is not used: the package 'wandb' is not installed.")
            return
        if wandb.run is not None and wandb.run is _left_open:
            self._guard(wandb.finish, "did not finish the run before")
        if wandb.run is not None:
            self._guard(lambda: self._join(wandb.run), "does not take this run's metrics")
        elif os.environ.get("WANDB_MODE", "online") != "online" or self._has_credentials(wandb):
            if not self._guard(lambda: self._open(wandb), "did not start and records offline"):
                # The failed attempt still owns the run id.
                self._guard(wandb.teardown, "did not stop")
        if self._run is None:
            self._guard(lambda: self._open(wandb, mode="offline"), "did not start")
        run = self._run
        if run is not None and run.offline:
            self.where = str(Path(run.dir).parent)
            self._say(
                f"W&B run {self.run_id} is recorded offline; upload it with: wandb sync "
                f"{self.where}"
            )
        elif run is not None and not run.disabled:
            self.where = run.url
            self._say(f"W&B run {self.run_id}: {self.where}")

    def _has_credentials(self, wandb) -> bool:
        """Asked before wandb.init, which would ask for a key on a terminal and so block every
        rank.
        """
        found = []

        def ask() -> None:
            wandb.setup(wandb.Settings(silent=True))
            found.append(wandb.login(verify=False, prompt=False))

        self._guard(ask, "refused its key")
        if found == [False]:
            self._say(
                "W&B has no API key (set WANDB_API_KEY or run `wandb login`), so it records "
                "offline."
            )
        return found == [True]

    def _open(self, wandb, **forced) -> None:
        environment = os.environ.get
        settings = wandb.Settings(
            silent=True,  # we report what matters in one line
            console=environment("WANDB_CONSOLE", "off"),  # a captured traceback could hold a secret
            disable_git=True,  # it records the remote's address and user name; we record the commit
            init_timeout=float(environment("WANDB_INIT_TIMEOUT", 60)),
            # In seconds; what is not uploaded by then is left to wandb sync.
            finish_timeout=float(environment("WANDB_FINISH_TIMEOUT", 20)),
            **forced,
        )
        argv, sys.argv = sys.argv, redact_argv(sys.argv)  # W&B records the command line
        try:
            run = wandb.init(
                project=redact(environment("WANDB_PROJECT") or self._config.project),
                name=redact(self._config.run_name),
                id=self.run_id,
                resume="allow",
                dir=str(self._run_dir),
                config=self._settings(),
                settings=settings,
            )
        finally:
            sys.argv = argv
        global _left_open
        _left_open = run
        self._record_in(run)

    def _join(self, run: Any) -> None:
        run.config.update(self._settings(), allow_val_change=True)
        self.run_id = run.id
        self._record_in(run)

    def _settings(self) -> dict[str, Any]:
        return redact({**self._config.to_dict(), **provenance()})

    def _record_in(self, run: Any) -> None:
        # Our own step instead of W&B's: W&B would refuse the smaller steps that follow a resume
        # from an older checkpoint.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _guard(self, action: Callable[[], Any], what_happened: str) -> bool:
        """Run `action`; a failure of any kind inside W&B costs one sentence, never the training."""
        try:
            action()
        # Its service, its network and its server all fail in their own ways.
        except Exception as problem:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            self._say(
                f"W&B {what_happened} ({reason}); training goes on and {METRICS_FILE} is complete."
            )
            return False
        return True


COLUMNS = (
    "step",
    "source",
    "prompt",
    "completion",
    "teacher probability per token",
    "student probability per token",
    "divergence (nats per token)",
)


def _table(step: int, rollouts: list[Record]):
    import wandb

    def values(rollout: Record) -> list[Any]:
        return [
            step,
            rollout["source"],
            rollout["prompt"],
            rollout["completion"],
            _probability(rollout.get("teacher_logprob")),
            _probability(rollout.get("student_logprob")),
            rollout.get("divergence"),
        ]

    return wandb.Table(columns=list(COLUMNS), data=[values(rollout) for rollout in rollouts])


def _probability(logprob: float | None) -> float | None:
    return None if logprob is None else math.exp(logprob)
