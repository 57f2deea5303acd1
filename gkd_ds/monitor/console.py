"""A run on the console: a progress bar on a terminal, else one line per update that is due."""

import os
import sys
import time

from tqdm import tqdm

from gkd_ds.monitor.sinks import Record, flat, is_update
from gkd_ds.runtime.redaction import redact


class Console:
    """Shows updates and evaluations, and prints messages without tearing the bar.

    `total` is the number of updates of the whole run. The bar goes to stderr, lines go to stdout.
    """

    def __init__(self, total: int, disable_bar: bool):
        self._total = total
        self._disable_bar = disable_bar
        self._bar: tqdm | None = None
        # Step and start time of this process's first update.
        self._first: tuple[int, float] | None = None

    def log(self, record: Record, shown: Record, due: bool) -> None:
        """An update moves the bar, or prints a line when it is due; an evaluation prints a line."""
        if not is_update(record):
            self._say_evaluation(record)
            return
        if self._first is None:
            self._first = (record["step"], time.monotonic() - (record.get("perf/step_s") or 0.0))
        if sys.stderr.isatty() and not self._disable_bar:
            self._advance_bar(shown)
        elif due:
            print(self._line(shown), flush=True)

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Rollouts are too long for a console."""

    def say(self, message: str) -> None:
        """Print one message, with its secrets removed."""
        tqdm.write(redact(message), file=sys.stderr if self._bar is not None else sys.stdout)
        sys.stdout.flush()

    def close(self, exit_code: int) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say_evaluation(self, record: Record) -> None:
        numbers = [
            f"{name.removeprefix('eval/')} {_short(value)}"
            for name, value in flat(record).items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self.say(f"evaluation after update {record['step']}:  {'  '.join(numbers)}")

    def _advance_bar(self, shown: Record) -> None:
        if self._bar is None:
            self._bar = self._new_bar(shown)
        self._bar.set_postfix_str(
            f"loss {_short(shown.get('loss'))}, {_short(_tokens_per_s(shown))} tokens/s",
            refresh=False,
        )
        self._bar.update(shown["step"] - self._bar.n)

    def _new_bar(self, shown: Record) -> tqdm:
        # Some containers say that their terminal has no columns.
        knows_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        size = {"dynamic_ncols": True} if knows_size else {"ncols": 100, "nrows": 25}
        bar = tqdm(
            total=self._total,
            initial=shown["step"] - 1,
            desc="distilling",
            unit="update",
            file=sys.stderr,
            **size,
        )
        # The bar appears after the first update, and estimates the time that is left as if it had
        # appeared before it.
        bar.start_t = bar.last_print_t = time.time() - (shown.get("perf/step_s") or 0.0)
        return bar

    def _line(self, shown: Record) -> str:
        first_step, started = self._first
        per_update = (time.monotonic() - started) / (shown["step"] - first_step + 1)
        sources = shown.get("source") or {}
        parts = [
            f"update {shown['step']:>{len(str(self._total))}}/{self._total}",
            f"loss {_short(shown.get('loss'))}",
            "+".join(f"{count} {name}" for name, count in sources.items() if count),
            f"length {_short(shown.get('mean_completion_length'))}",
            f"lr {_short(shown.get('lr'))}",
            f"grad {_short(shown.get('grad_norm'))}",
            f"{_short(_tokens_per_s(shown))} tokens/s",
            f"{_short(shown.get('perf/step_s'))} s/update",
            f"{tqdm.format_interval(per_update * max(self._total - shown['step'], 0))} left",
        ]
        return "  ".join(part for part in parts if part)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _tokens_per_s(record: Record) -> float | None:
    """Completion tokens per second of the whole update, not of its rollout alone."""
    seconds, tokens = record.get("perf/step_s"), record.get("completion_tokens")
    return tokens / seconds if seconds and tokens is not None else None
