"""One stream of metrics: a row per update goes to metrics.jsonl, to the console and to W&B.

    tracker = Tracker(config, rank, run_dir, total_steps=100)
    tracker.log_update({"step": 1, "loss": 0.5, ...})
    tracker.close(exit_code=0)

`metrics.jsonl` is the truth: every row is in it, whole, whatever the console and W&B do. W&B is a
courtesy: when it fails, one sentence says so and training goes on. Rows hold plain Python numbers,
so logging never waits for a device. Every text that leaves this file has its secrets removed
(secrets.py).
"""

import math
import os
import sys
import time
import uuid
from pathlib import Path

from tqdm import tqdm

from gkd_ds.monitor.jsonl import JsonLines, Row
from gkd_ds.runtime.provenance import provenance
from gkd_ds.runtime.redaction import redact, redact_argv

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


class Tracker:
    """What rank 0 tells the world about a run; on every other rank all methods do nothing.

    Args:
        config: GKDConfig; read are report_to, project, run_name, logging_*, disable_tqdm and
            to_dict().
        rank: global rank of this process.
        run_dir: directory of the run; gets metrics.jsonl, rollouts.jsonl and W&B's own folder.
        total_steps: number of updates of the whole run, for the progress bar and the remaining
            time.
        resume_run_id: `run_id` of the run that is continued, from its checkpoint.

    Attributes:
        run_id: W&B id of the run (also without W&B, so that a resume may turn it on); None on other
            ranks.
        where: where to look at the W&B run: an address or a local directory; None without W&B.
    """

    def __init__(
        self,
        config,
        rank: int,
        run_dir: str | os.PathLike,
        total_steps: int,
        resume_run_id: str | None = None,
    ):
        self._writes = rank == 0
        self._config = config
        self._run_dir = Path(run_dir)
        self._total = total_steps
        self.run_id: str | None = None
        self.where: str | None = None
        self._bar: tqdm | None = None
        self._wandb_run = None
        self._unlogged: list[Row] = []  # rows since the last one that was shown
        self._first: tuple[int, float] | None = (
            None  # step and start time of this process's first update
        )
        self._epoch = 0
        if not self._writes:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = JsonLines(self._run_dir / METRICS_FILE)
        self._rollouts = JsonLines(self._run_dir / ROLLOUTS_FILE)
        self.run_id = resume_run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        if "wandb" in config.report_to:
            self._start_wandb()

    def log_update(self, row: Row) -> None:
        """Record one optimizer update: `step` (1 for the first) and plain numbers, None for
        unknown.
        """
        if not self._writes:
            return
        row = redact(row)
        self._metrics.append(row)
        if self._first is None:
            self._first = (row["step"], time.monotonic() - (row.get("perf/step_s") or 0.0))
            self._epoch = int((row.get("epoch") or 0) - 1e-9)
        due = self._is_due(row)
        self._unlogged.append(row)
        shown = _averaged(self._unlogged, self._config.logging_nan_inf_filter)
        if self._on_terminal():
            self._advance_bar(shown)
        elif due:
            print(self._line(shown), flush=True)
        if due:
            self._to_wandb(_flat(shown))
            self._unlogged = []

    def log_eval(self, row: Row) -> None:
        """Record one evaluation: `step` (updates done so far) and `eval/...` numbers."""
        if not self._writes:
            return
        row = redact(row)
        self._metrics.append(row)
        numbers = [
            f"{name.removeprefix('eval/')} {_short(value)}"
            for name, value in _flat(row).items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self.say(f"evaluation after update {row['step']}:  {'  '.join(numbers)}")
        self._to_wandb(_flat(row))

    def log_rollouts(self, step: int, rows: list[Row]) -> None:
        """Record sampled completions beside what both models think of them.

        Each row: prompt, completion, source (texts); teacher_logprob, student_logprob (mean
        log-probability per completion token) and divergence (mean per completion token), in nats,
        None if unknown.
        """
        if not self._writes or not rows:
            return
        rows = redact(rows)
        for row in rows:
            self._rollouts.append({"step": step, **row})
        if self._wandb_run is not None:
            self._to_wandb({"step": step, "rollouts": _table(step, rows)})

    def truncate(self, step: int, evaluations: int | None = None) -> None:
        """Forget every row after update `step` (call it once on resume; -1 forgets everything).

        `evaluations` is how many of the evaluations after that very update count (None: all): one
        that came after the checkpoint was written is made again.
        """
        if self._writes:
            rows_of_step = None if evaluations is None else evaluations + (step > 0)
            for lines, at_step in ((self._metrics, rows_of_step), (self._rollouts, None)):
                lost = lines.truncate(step, at_step)
                if lost:
                    self.say(f"{lines.path.name}: {lost} unreadable lines were dropped.")

    def sync(self) -> None:
        """Force what was logged onto the disk (call it before a checkpoint is committed)."""
        if self._writes:
            self._metrics.sync()
            self._rollouts.sync()

    def say(self, message: str) -> None:
        """Print one message on rank 0 without tearing the progress bar."""
        if self._writes:
            tqdm.write(redact(message), file=sys.stderr if self._bar is not None else sys.stdout)
            sys.stdout.flush()

    def close(self, exit_code: int = 0) -> None:
        """Finish the bar, the files and the W&B run (failed unless `exit_code` is 0). Safe to call
        twice.
        """
        if not self._writes:
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._wandb_run is not None:
            self._guard_wandb(
                lambda: self._wandb_run.finish(exit_code=exit_code), "was not closed properly"
            )
            self._wandb_run = None
        self._metrics.close()
        self._rollouts.close()

    # ---- console

    def _is_due(self, row: Row) -> bool:
        step, strategy = row["step"], self._config.logging_strategy
        epoch_before, self._epoch = self._epoch, int(row.get("epoch") or 0)
        if strategy == "no":
            return False
        if step >= self._total or (step == 1 and self._config.logging_first_step):
            return True
        if strategy == "epoch":
            return self._epoch > epoch_before
        every = self._config.logging_steps
        every = (
            math.ceil(every * self._total) if every < 1 else int(every)
        )  # below 1: a share of the run
        return step % max(every, 1) == 0

    def _on_terminal(self) -> bool:
        return sys.stderr.isatty() and not self._config.disable_tqdm

    def _advance_bar(self, row: Row) -> None:
        if self._bar is None:
            knows_size = (
                os.get_terminal_size(sys.stderr.fileno()).columns > 0
            )  # some containers say 0
            size = {"dynamic_ncols": True} if knows_size else {"ncols": 100, "nrows": 25}
            self._bar = tqdm(
                total=self._total,
                initial=row["step"] - 1,
                desc="distilling",
                unit="update",
                file=sys.stderr,
                **size,
            )
            # The bar appears after the first update: for the time that is left, it began before it.
            self._bar.start_t = self._bar.last_print_t = time.time() - (
                row.get("perf/step_s") or 0.0
            )
        self._bar.set_postfix_str(
            f"loss {_short(row.get('loss'))}, {_short(_tokens_per_s(row))} tokens/s", refresh=False
        )
        self._bar.update(row["step"] - self._bar.n)

    def _line(self, row: Row) -> str:
        first_step, started = self._first
        per_update = (time.monotonic() - started) / (row["step"] - first_step + 1)
        sources = row.get("source") or {}
        parts = [
            f"update {row['step']:>{len(str(self._total))}}/{self._total}",
            f"loss {_short(row.get('loss'))}",
            "+".join(f"{count} {name}" for name, count in sources.items() if count),
            f"length {_short(row.get('mean_completion_length'))}",
            f"lr {_short(row.get('lr'))}",
            f"grad {_short(row.get('grad_norm'))}",
            f"{_short(_tokens_per_s(row))} tokens/s",
            f"{_short(row.get('perf/step_s'))} s/update",
            f"{tqdm.format_interval(per_update * max(self._total - row['step'], 0))} left",
        ]
        return "  ".join(part for part in parts if part)

    # ---- W&B

    def _start_wandb(self) -> None:
        """Open the run; without a server or a key it is recorded offline and can be uploaded
        later.
        """
        try:
            import wandb
        except ImportError:
            self.say("W&B is not used: the package 'wandb' is not installed.")
            return
        if os.environ.get("WANDB_MODE", "online") != "online" or self._has_credentials(wandb):
            if not self._guard_wandb(
                lambda: self._open_wandb(wandb), "did not start and records offline"
            ):
                self._guard_wandb(
                    wandb.teardown, "did not stop"
                )  # the failed attempt still owns the run id
        if self._wandb_run is None:
            self._guard_wandb(lambda: self._open_wandb(wandb, mode="offline"), "did not start")
        run = self._wandb_run
        if run is not None and run.offline:
            self.where = str(Path(run.dir).parent)
            self.say(
                f"W&B run {self.run_id} is recorded offline; upload it with: wandb sync "
                f"{self.where}"
            )
        elif run is not None and not run.disabled:
            self.where = run.url
            self.say(f"W&B run {self.run_id}: {self.where}")

    def _has_credentials(self, wandb) -> bool:
        """Asked before wandb.init, which would ask for a key on a terminal and so block every
        rank.
        """
        found = []

        def ask() -> None:
            wandb.setup(wandb.Settings(silent=True))
            found.append(wandb.login(verify=False, prompt=False))

        self._guard_wandb(ask, "refused its key")
        if found == [False]:
            self.say(
                "W&B has no API key (set WANDB_API_KEY or run `wandb login`), so it records "
                "offline."
            )
        return found == [True]

    def _open_wandb(self, wandb, **forced) -> None:
        environment = os.environ.get
        settings = wandb.Settings(
            silent=True,  # we report what matters in one line
            console=environment("WANDB_CONSOLE", "off"),  # a captured traceback could hold a secret
            disable_git=True,  # it records the remote's address, user name included; we record the commit
            init_timeout=float(environment("WANDB_INIT_TIMEOUT", 60)),
            finish_timeout=float(
                environment("WANDB_FINISH_TIMEOUT", 20)
            ),  # the rest waits for wandb sync
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
                config=redact({**self._config.to_dict(), **provenance()}),
                settings=settings,
            )
        finally:
            sys.argv = argv
        # Our own step, not W&B's: after a resume from an older checkpoint W&B would refuse smaller
        # steps.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._wandb_run = run

    def _to_wandb(self, row: Row) -> None:
        if self._wandb_run is None:
            return
        if not self._guard_wandb(lambda: self._wandb_run.log(row), "stopped recording"):
            self._wandb_run = None

    def _guard_wandb(self, action, what_happened: str) -> bool:
        """Run `action`; a failure of any kind inside W&B costs one sentence, never the training."""
        try:
            action()
        except (
            Exception
        ) as problem:  # its service, its network and its server all fail in their own ways
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            self.say(
                f"W&B {what_happened} ({reason}); training goes on and {METRICS_FILE} is complete."
            )
            return False
        return True


def _averaged(rows: list[Row], only_finite: bool) -> Row:
    """The last row with its losses averaged over `rows`: the loss of one window is too noisy to
    show.
    """
    shown = dict(rows[-1])
    for name in {
        name for row in rows for name in row if name == "loss" or name.startswith("loss/")
    }:
        values = [row[name] for row in rows if row.get(name) is not None]
        values = [value for value in values if math.isfinite(value) or not only_finite]
        shown[name] = sum(values) / len(values) if values else None
    return shown


def _flat(row: Row) -> Row:
    """{"source": {"student": 3}} as {"source/student": 3}, without what is neither a number nor a
    text.
    """
    flat = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {}
        flat.update(
            {f"{name}/{key}": item for key, item in inner.items()} if inner else {name: value}
        )
    return {name: value for name, value in flat.items() if isinstance(value, (int, float, str))}


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _tokens_per_s(row: Row) -> float | None:
    """Completion tokens per second of the whole update, not of its rollout alone."""
    seconds, tokens = row.get("perf/step_s"), row.get("completion_tokens")
    return tokens / seconds if seconds and tokens is not None else None


def _table(step: int, rows: list[Row]):
    import wandb

    def probability(logprob: float | None) -> float | None:
        return None if logprob is None else math.exp(logprob)

    columns = [
        "step",
        "source",
        "prompt",
        "completion",
        "teacher probability per token",
        "student probability per token",
        "divergence (nats per token)",
    ]
    return wandb.Table(
        columns=columns,
        data=[
            [
                step,
                row["source"],
                row["prompt"],
                row["completion"],
                probability(row.get("teacher_logprob")),
                probability(row.get("student_logprob")),
                row.get("divergence"),
            ]
            for row in rows
        ],
    )
