"""A callback that notes which of transformers' events come, and a run that makes all of them come."""

from __future__ import annotations

from transformers import TrainerCallback

EVENT_FIELDS = {
    "num_train_epochs": 2,
    "max_steps": -1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 1,
}
# Windows of several micro-batches, the last one in the middle of an epoch; everything but logging
# by epochs.
SHORT_FIELDS = {
    "num_train_epochs": 5,
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 2,
}


class StopsEpochs(TrainerCallback):
    """Asks for what gkd_ds does not do."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = True


class Events(TrainerCallback):
    """`seen` are the names of the events, in their order."""

    def __init__(self):
        self.seen: list[str] = []

    def __getattribute__(self, name: str):
        if name.startswith("on_"):
            self.seen.append(name)
        return super().__getattribute__(name)
