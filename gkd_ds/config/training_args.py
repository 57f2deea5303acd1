"""The face of GKDConfig that transformers' callbacks read, as they would TrainingArguments; and the
configuration as plain values, without secrets, for whatever writes it down.
"""

import dataclasses
import json
import os
from enum import Enum
from typing import Any

from gkd_ds.config.unsupported import REASONS
from gkd_ds.runtime.redaction import OPEN_KEYS, SECRET_KEYS, redact


class ReadAsTrainingArguments:
    """Derived values of GKDConfig. The launcher sets the variables that tell the ranks."""

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, without tokens or passwords; what acts
        comes first.
        """
        fields = sorted(dataclasses.fields(self), key=lambda field: field.name in REASONS)
        return {
            field.name: plain(getattr(self, field.name))
            for field in fields
            if not field.metadata["secret"]
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` with text in place of nested values, as transformers' callbacks want it."""
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in self.to_dict().items()
        }

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
    def should_log(self) -> bool:
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        return self.process_index == 0

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size


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
