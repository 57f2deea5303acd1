"""The face of GKDConfig that scripts and transformers' callbacks know from TrainingArguments; and
the configuration as plain values, without secrets, for whatever writes it down.
"""

import contextlib
import json
import math
import os
from dataclasses import fields
from enum import Enum
from types import SimpleNamespace
from typing import Any

from gkd_ds.config.fields import OPTIONS
from gkd_ds.runtime.redaction import OPEN_KEYS, SECRET_KEYS, redact


class Borrowed:
    """A method or property of TrainingArguments, as it is; looked up when it is used, since
    importing it costs an import of torch.
    """

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None:
            return self
        from transformers import TrainingArguments

        return vars(TrainingArguments)[self.name].__get__(config, owner)


class ReadAsTrainingArguments:
    """Derived values of GKDConfig. The launcher sets the variables that tell the ranks.

    Fields that a `set_` method changes are checked before training, like all others that are set
    after the configuration was made.
    """

    set_training, set_evaluate, set_testing = Borrowed(), Borrowed(), Borrowed()
    set_save, set_logging, set_push_to_hub = Borrowed(), Borrowed(), Borrowed()
    set_optimizer, set_lr_scheduler, set_dataloader = Borrowed(), Borrowed(), Borrowed()
    should_log, should_save, get_process_log_level = Borrowed(), Borrowed(), Borrowed()
    ddp_timeout_delta, place_model_on_device = Borrowed(), Borrowed()

    # ---- As plain values ----

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, without tokens or passwords; what acts
        comes first, and what a subclass adds comes last.
        """
        added = [field.name for field in fields(self) if field.name not in OPTIONS]
        names = [name for name, option in OPTIONS.items() if not option.is_secret]
        return {name: plain(getattr(self, name)) for name in (*names, *added)}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` with text in place of nested values, as transformers' callbacks want it."""
        sizes = {"train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in {**self.to_dict(), **sizes}.items()
        }

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        """The settings that are not the defaults."""
        settings = [
            f"{name}={value!r}"
            for name, value in self.to_dict().items()
            if name not in OPTIONS or value != plain(OPTIONS[name].default)
        ]
        return f"{type(self).__name__}({', '.join(settings)})"

    # ---- Processes ----

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", max(self.local_rank, 0)))

    @property
    def device(self) -> Any:
        """The torch.device of this process."""
        import torch
        from deepspeed.accelerator import get_accelerator

        if self.use_cpu:
            return torch.device("cpu")
        accelerator = get_accelerator()
        if accelerator.is_synchronized_device():  # a CPU
            return torch.device(accelerator.device_name())
        return torch.device(accelerator.device_name(self.local_process_index))

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of this process: 1, or 0 where there are none."""
        return int(self.device.type != "cpu")

    @property
    def parallel_mode(self) -> Any:
        """transformers' ParallelMode."""
        from transformers.training_args import ParallelMode

        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def distributed_state(self) -> SimpleNamespace:
        """What transformers and scripts read of accelerate's PartialState."""
        return SimpleNamespace(
            num_processes=self.world_size,
            process_index=self.process_index,
            local_process_index=self.local_process_index,
            is_main_process=self.process_index == 0,
            is_local_main_process=self.local_process_index == 0,
            device=self.device,
        )

    def main_process_first(
        self, local: bool = True, desc: str = "work"
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, each node's first rank (or the first of all) works before the others do; a
        collective.
        """
        from transformers import TrainingArguments

        from gkd_ds.runtime.process_group import join

        if self.world_size > 1:
            join(self.ddp_backend, self.ddp_timeout)
        return TrainingArguments.main_process_first(self, local, desc)

    # ---- Numbers ----

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Updates over which the learning rate rises, of so many in all."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, without secrets: a nested entry such as
    model_init_kwargs={"token": ...} is left out, and the values of secret environment variables are
    hidden."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        open_keys = [key for key in value if key in OPEN_KEYS or not SECRET_KEYS.search(str(key))]
        return {str(key): plain(value[key]) for key in open_keys}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else redact(str(value))
