"""Signs that a distillation is going wrong, read from numbers that every window has anyway.

Two kinds. A bad update (NaN or Inf in loss, gradients or teacher targets) is skipped by all ranks;
BadUpdates counts them and stops a run that does nothing else. The other signs are no errors:
completions that get much shorter or longer, loops, no end-of-turn token, a student that has become
certain of everything. `findings` turns them into sentences, and RateLimit keeps a sign from filling
the log.

Everything here is arithmetic on plain numbers that all ranks share; nothing communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

REFERENCE_WINDOWS = 20  # the first windows of the history say what is normal for this run
RECENT_WINDOWS = 5  # the last ones are compared with it; one odd window is no finding
COLLAPSE, EXPLOSION = 0.25, 3.0  # of the reference length
LOOPING_SHARE = 0.3
UNFINISHED_SHARE = 0.8
ENTROPY_COLLAPSE, LOWEST_ENTROPY = 0.1, 0.02  # of the reference; nats per token

# Where a NaN or Inf can be, in the order in which one causes the next, and what to do about many of
# them.
BAD_KINDS = {
    "teacher targets": "check the teacher's weights and precision (bf16 instead of fp16)",
    "loss": "resume from an earlier checkpoint with a lower learning_rate, and look at the logged "
    "samples",
    "gradients": "lower learning_rate or max_grad_norm, or use bf16 instead of fp16",
}


class TrainingStopped(RuntimeError):
    """The run cannot go on by itself; the message is one sentence of diagnosis. Exit code 65
    (DIVERGED).
    """


@dataclass(frozen=True)
class WindowStats:
    """What is measured of the completions that the student sampled in one window, over all ranks.

    Leave out windows without student completions. `looping_share` is the share for which `loops`
    holds.
    """

    step: int
    mean_length: float  # tokens, stop token included
    finished_share: float  # with a stop token, in [0, 1]
    looping_share: float  # in [0, 1]
    entropy: float | None = (
        None  # nats per token of the student's own distribution, where it is measured
    )


# -- bad updates ------------------------------------------------------------------------------


@dataclass
class BadUpdates:
    """Counts skipped updates. `total` and `in_a_row` belong into a checkpoint's state."""

    limit: int  # GKDConfig.max_bad_updates
    total: int = 0
    in_a_row: int = 0
    kinds: list[str] = field(default_factory=list)  # of the ones in a row

    def record(self, step: int, bad: str | None) -> str | None:
        """Count the update of `step`; return the sentence to log if it was skipped.

        `bad` is None for a good update, else where the NaN or Inf was: "loss", "gradients" or
        "teacher targets". All ranks must pass the same (agreed) value. Raises TrainingStopped at
        the limit.
        """
        if bad is None:
            self.in_a_row, self.kinds = 0, []
            return None
        assert bad in BAD_KINDS, bad
        self.total += 1
        self.in_a_row += 1
        self.kinds.append(bad)
        if self.in_a_row >= self.limit:
            raise TrainingStopped(self._diagnosis(step))
        return (
            f"update {step} was skipped: NaN or Inf in the {bad} "
            f"({self.in_a_row} in a row, {self.total} in all)"
        )

    def _diagnosis(self, step: int) -> str:
        worst = next((kind for kind in BAD_KINDS if kind in self.kinds), "loss")
        return (
            f"{self.in_a_row} updates in a row up to step {step} were skipped because of NaN or "
            "Inf in the "
            f"{worst} ({self.total} skipped in the whole run); {BAD_KINDS[worst]}."
        )


# ----------------------------------------------------------------------------------------- warnings


def loops(
    tokens: Sequence[int], longest_period: int = 16, least_tokens: int = 24, least_rounds: int = 4
) -> bool:
    """Whether a completion (token ids without the stop token) ends in a repeated n-gram.

    The tail must be one n-gram of at most `longest_period` tokens, repeated `least_rounds` times or
    more, over at least `least_tokens` tokens: "no, no, no" is language, "no, " a dozen times is a
    loop.
    """
    for period in range(1, longest_period + 1):
        length = max(least_tokens, least_rounds * period)
        if length > len(tokens):
            return False
        tail = list(tokens[-length:])
        if tail[period:] == tail[:-period]:
            return True
    return False


def looping_share(completions: Sequence[Sequence[int]]) -> float:
    """The share of completions that end in a loop, in [0, 1]; 0 for none."""
    return mean(loops(tokens) for tokens in completions) if completions else 0.0


def findings(history: Sequence[WindowStats]) -> dict[str, str]:
    """{sign: sentence} for the last windows of `history` (oldest first), compared with its first
    ones.
    """
    if len(history) < 2 * RECENT_WINDOWS:
        return {}
    recent, reference = (
        history[-RECENT_WINDOWS:],
        history[: min(REFERENCE_WINDOWS, len(history) - RECENT_WINDOWS)],
    )
    found = {}
    length, normal = median(s.mean_length for s in recent), median(s.mean_length for s in reference)
    if length < COLLAPSE * normal and normal >= 8:
        found["length collapse"] = (
            f"completions have become short: {length:.0f} tokens, at first {normal:.0f}"
        )
    if length > EXPLOSION * normal:
        found["length explosion"] = (
            f"completions have become long: {length:.0f} tokens, at first {normal:.0f}"
        )
    looping = median(s.looping_share for s in recent)
    if looping > LOOPING_SHARE:
        found["loops"] = f"{looping:.0%} of the completions end in a loop of repeated tokens"
    unfinished = 1 - median(s.finished_share for s in recent)
    if unfinished > UNFINISHED_SHARE:
        found["missing end"] = (
            f"{unfinished:.0%} of the completions reach max_new_tokens without a stop token"
        )
    return found | _entropy_finding(recent, reference)


def trimmed(history: Sequence[WindowStats]) -> list[WindowStats]:
    """What `findings` needs of `history`, now and after any further windows."""
    return [*history[:REFERENCE_WINDOWS], *history[REFERENCE_WINDOWS:][-RECENT_WINDOWS:]]


def _entropy_finding(
    recent: Sequence[WindowStats], reference: Sequence[WindowStats]
) -> dict[str, str]:
    now = [s.entropy for s in recent if s.entropy is not None]
    before = [s.entropy for s in reference if s.entropy is not None]
    if (
        not now
        or not before
        or median(now) >= max(ENTROPY_COLLAPSE * median(before), LOWEST_ENTROPY)
    ):
        return {}
    change = f"{median(now):.3f} nats per token, at first {median(before):.3f}"
    return {"entropy collapse": f"the student has become certain of nearly every token: {change}"}


@dataclass
class RateLimit:
    """Lets each sign through when it appears, and then once in `every` steps while it stays."""

    every: int = 50
    last: dict[str, int] = field(
        default_factory=dict
    )  # sign: the step at which it was reported last

    def allow(self, sign: str, step: int) -> bool:
        """Whether the sign may be reported at `step`; if so, it counts as reported."""
        if sign in self.last and step - self.last[sign] < self.every:
            return False
        self.last[sign] = step
        return True


def warnings(history: Sequence[WindowStats], limit: RateLimit) -> list[str]:
    """The sentences to log after the last window of `history`: findings that have not been told
    lately.
    """
    step = history[-1].step if history else 0
    return [
        f"step {step}: {text}"
        for sign, text in findings(history).items()
        if limit.allow(sign, step)
    ]
