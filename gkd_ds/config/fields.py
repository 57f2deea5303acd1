"""All fields of GKDConfig, in groups.

python tools/field_table.py > gkd_ds/FIELDS.md   # what becomes of each of them
"""

from gkd_ds.config.inactive_fields import TABLE, InactiveFields
from gkd_ds.config.option import Option, options_of
from gkd_ds.config.reporting_fields import Checkpoints, Evaluation, Hub, Logging
from gkd_ds.config.task_fields import Adapters, Data, Distillation, Models, Run
from gkd_ds.config.training_fields import Batches, Optimizer, Precision, Processes

# A dataclass's docstring is the heading of its group.
_ACTIVE = [
    *(Run, Models, Adapters, Data, Distillation),
    *(Batches, Optimizer, Precision, Processes),
    *(Logging, Evaluation, Checkpoints, Hub),
]
GROUPS: dict[str, list[Option]] = {group.__doc__: options_of(group) for group in _ACTIVE}
INACTIVE = {row.name: row for row in TABLE}
OPTIONS: dict[str, Option] = {
    option.name: option
    for options in (*GROUPS.values(), options_of(InactiveFields))
    for option in options
}
# What GKDConfig inherits; of several dataclasses, the fields of the last come first.
BASES = (InactiveFields, *reversed(_ACTIVE))
