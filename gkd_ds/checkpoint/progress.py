"""What a run remembers beside its weights and transformers' TrainerState.

All of it is in every checkpoint, so that a run that goes on says and does what it would have said
and done anyway.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_callback import TrainerState

from gkd_ds.checkpoint.changed import changes, difference, settings
from gkd_ds.checkpoint.manifest import MANIFEST, Manifest
from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.guards import BadUpdates, RateLimit, WindowStats
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.provenance import library_versions


@dataclass
class Mean:
    """The mean of what was added; 0 of nothing."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / max(self.count, 1)


def initial_state(config: GKDConfig, windows_per_epoch: int) -> TrainerState:
    """transformers' TrainerState of a run that begins; `max_steps` is the number of its updates."""
    by_epochs = math.ceil(config.num_train_epochs * windows_per_epoch)
    has_steps = config.max_steps > 0
    epochs = config.max_steps / windows_per_epoch if has_steps else config.num_train_epochs
    state = TrainerState(
        max_steps=config.max_steps if has_steps else by_epochs,
        num_train_epochs=math.ceil(epochs),
        train_batch_size=config.per_device_train_batch_size,
        is_local_process_zero=os.environ.get("LOCAL_RANK", "0") == "0",
        is_world_process_zero=ranks.rank() == 0,
    )
    state.compute_steps(config, state.max_steps)
    state.eval_steps = state.eval_steps or state.logging_steps
    return state


@dataclass
class Progress:
    """Steps are numbers of updates."""

    bad_updates: BadUpdates
    epoch_ended_at: int = (
        0  # the step after which on_epoch_end came last; an epoch is open at any later one
    )
    evaluation_due: bool = False  # after this step, and not done yet
    evaluations: int = 0  # recorded since the last update
    train_loss: Mean = field(default_factory=Mean)  # of the updates that were applied
    unlogged_loss: Mean = field(default_factory=Mean)  # of the updates since the last on_log
    last_update: dict[str, float] = field(default_factory=dict)  # the rest of what on_log tells
    history: list[WindowStats] = field(default_factory=list)  # what the guards need of it
    told: RateLimit = field(default_factory=RateLimit)

    def note_update(self, record: dict[str, Any], bad: str | None, only_finite: bool) -> None:
        """Keep of an update's record what the log tells later; `bad` says why it was skipped."""
        self.evaluations = 0
        self.last_update = {
            "grad_norm": record["grad_norm"],
            "learning_rate": record["lr"],
        }
        if bad is None:
            self.train_loss.add(record["loss"])
        if math.isfinite(record["loss"]) or not only_finite:
            self.unlogged_loss.add(record["loss"])

    def take_unlogged(self) -> dict[str, float] | None:
        """What on_log tells of the updates since this was asked last; None if there were none."""
        if not self.last_update:
            return None
        logs = {"loss": self.unlogged_loss.value, **self.last_update}
        self.unlogged_loss, self.last_update = Mean(), {}
        return logs

    @staticmethod
    def of(state: dict[str, Any], config: GKDConfig) -> Progress:
        """The inverse of dataclasses.asdict, for a state that `check_state` has passed."""
        parts = {
            "bad_updates": BadUpdates(**{**state["bad_updates"], "limit": config.max_bad_updates}),
            "train_loss": Mean(**state["train_loss"]),
            "unlogged_loss": Mean(**state["unlogged_loss"]),
            "history": [WindowStats(**stats) for stats in state["history"]],
            "told": RateLimit(**state["told"]),
        }
        return Progress(**{**state, **parts})


NUMBER = int | float
_MEAN = {"total": NUMBER, "count": int}
# The state of a checkpoint: a type, an object with these keys and no others, or a list of such.
STATE = {
    "trainer_state": dict,
    "progress": {
        "bad_updates": {"limit": int, "total": int, "in_a_row": int, "kinds": [str]},
        "epoch_ended_at": int,
        "evaluation_due": bool,
        "evaluations": int,
        "train_loss": _MEAN,
        "unlogged_loss": _MEAN,
        "last_update": dict,
        "history": [
            {
                "step": int,
                "mean_length": NUMBER,
                "finished_share": NUMBER,
                "looping_share": NUMBER,
                "entropy": NUMBER | None,
            }
        ],
        "told": {"every": int, "last": dict},
    },
    "tracker_run_id": str | None,
    "config": dict,
    "adapter": dict | None,
    "schedule": {
        "num_samples": int,
        "window_samples": int,
        "seed": int,
        "drop_last": bool,
        "data_seed": int,
        "training data": str,
        "draw_samples": int,
    },
}
TRAINER_STATE = {  # those of transformers' fields that a run goes on with
    "global_step": int,
    "epoch": NUMBER | None,
    "num_input_tokens_seen": int,
    "total_flos": NUMBER,
    "log_history": [dict],
    "best_metric": NUMBER | None,
    "best_global_step": int | None,
    "stateful_callbacks": dict,
}


def check_state(found: Manifest) -> None:
    """Raise InputError unless the state is one that this version of gkd_ds writes.

    The manifest's digest says that nothing has changed since it was written, not who wrote it.
    """
    problem = _mismatch(found.state, STATE, "state")
    if not problem:
        theirs = found.state["trainer_state"]
        wanted = {name: theirs[name] for name in TRAINER_STATE if name in theirs}
        problem = _mismatch(wanted, TRAINER_STATE, "state.trainer_state")
    if problem:
        raise InputError(
            f"cannot resume from {found.path}: {MANIFEST} {problem}, so another version of gkd_ds "
            "wrote it; "
            "go on with that version or from another checkpoint."
        )


def _mismatch(value: Any, shape: Any, name: str) -> str:
    """How `value` differs from `shape`, or an empty text."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"has no object '{name}'"
        if keys := sorted(set(value) ^ set(shape)):
            return f"{'lacks' if keys[0] in shape else 'has an unknown'} '{name}.{keys[0]}'"
        return next(
            filter(
                None,
                (_mismatch(value[key], inner, f"{name}.{key}") for key, inner in shape.items()),
            ),
            "",
        )
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"has no list '{name}'"
        return next(filter(None, (_mismatch(item, shape[0], f"{name}[]") for item in value)), "")
    return "" if isinstance(value, shape) else f"has a '{name}' of the wrong type"


def differences(found: Manifest, config: GKDConfig, passed: tuple[str, ...] = ()) -> list[str]:
    """One sentence for each setting or library that is not what it was when the checkpoint was
    written, with what that means (changed.py).
    """
    sentences = list(changes(found.state["config"], settings(config), passed))
    for name, version in library_versions().items():
        if found.versions.get(name) != version:
            sentences.append(difference(name, found.versions.get(name), version))
    return sentences
