"""Where a run's numbers go: what every sink of the tracker can do, and what a record is.

A sink is a class in a file of its own: console.py, jsonl.py, wandb_sink.py. The tracker makes it on
rank 0 and hands every record to it, with its secrets removed.
"""

from typing import Any, Protocol

# The numbers of one update (among them `loss`) or of one evaluation (`eval/...`), with their
# `step`; or one rollout as text, beside what both models think of it. Plain Python values, None for
# what is unknown.
Record = dict[str, Any]


class Sink(Protocol):
    """One place that is told about a run."""

    def log(self, record: Record, shown: Record, due: bool) -> None:
        """Take an update or an evaluation.

        `record` is what was measured. `shown` is the same with its losses averaged since the last
        record that was due; `due` says whether the configuration wants this one to be shown.
        """

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Take rollouts that were sampled at `step`."""

    def close(self, exit_code: int) -> None:
        """Finish; the run failed unless `exit_code` is 0. Safe to call twice."""


def is_update(record: Record) -> bool:
    """Whether the record is of an update; else it is of an evaluation."""
    return "loss" in record


def flat(record: Record) -> Record:
    """{"source": {"student": 3}} as {"source/student": 3}, without what is neither a number nor a
    text.
    """
    items: Record = {}
    for name, value in record.items():
        inner = value if isinstance(value, dict) else {}
        items.update({f"{name}/{key}": item for key, item in inner.items()} or {name: value})
    return {name: value for name, value in items.items() if isinstance(value, (int, float, str))}
