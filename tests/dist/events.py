"""A callback that notes which of transformers' events come, and a run that makes all of them come."""

from __future__ import annotations

from transformers import TrainerCallback

EVENT_KNOBS = {
    "num_train_epochs": 2,
    "max_steps": -1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 1,
}


class Events(TrainerCallback):
    """`seen` are the names of the events, in their order."""

    def __init__(self):
        self.seen: list[str] = []

    def __getattribute__(self, name: str):
        if name.startswith("on_"):
            self.seen.append(name)
        return super().__getattribute__(name)
