"""GKDConfig: every field of a run.

    from gkd_ds import GKDConfig
    args = GKDConfig(output_dir="runs/first", per_device_train_batch_size=1, lmbda=1.0)

The fields carry the names, meanings and defaults of TRL's GKDConfig, so code and recipes written
for it keep working; our own fields stand beside the ones they belong to (fields.py). What
transformers reads of TrainingArguments is inherited (training_args.py).

Everything knowable without files is checked when the object is made (`validate`); files and
directories by `validate_files`, which the command line and the trainer call before any model is
loaded, and by `check_output_dir_is_free`, before training. All raise InputError. Nothing here
imports torch, so a wrong field answers at once. `python -m gkd_ds.train --help` prints the fields.
"""

import os
from dataclasses import dataclass

from gkd_ds.config import checks
from gkd_ds.config.deepspeed_checks import read_student_file, read_teacher_file
from gkd_ds.config.fields import BASES, OPTIONS
from gkd_ds.config.inactive_fields import refuse_other_values
from gkd_ds.config.option import Alias, KeepsInitVars
from gkd_ds.config.training_args import ReadAsTrainingArguments
from gkd_ds.config.values import convert


@dataclass(kw_only=True, repr=False, eq=False)
class GKDConfig(ReadAsTrainingArguments, KeepsInitVars, *BASES):
    """All fields of a run. See the module docstring.

    Raises:
        InputError: a value of the wrong type or out of bounds, a combination that contradicts
        itself, or a value of one of TRL's fields that asks for what is not done here.
    """

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Convert text to the fields' types and check types, bounds and combinations. Safe to call
        again.

        Raises:
            InputError: the first thing that is wrong, by field name.
        """
        for option in OPTIONS.values():
            value = convert(option.name, option.kind, getattr(self, option.name))
            if option.bounds is not None:
                option.bounds.check(option.name, value)
            setattr(self, option.name, value)
        refuse_other_values(self)
        checks.check_combinations(self)

    def validate_files(self) -> None:
        """Check paths and DeepSpeed files, and that output_dir can be written.

        Raises:
            InputError: a file or directory is missing, malformed, contradicts a field, or cannot be
            written.
        """
        self.read_deepspeed_files()
        checks.check_files(self)

    def read_deepspeed_files(self) -> tuple[dict | None, dict | None]:
        """The student's and the teacher's DeepSpeed configuration, read and checked; None if not
        given.
        """
        return read_student_file(self), read_teacher_file(self)

    def check_output_dir_is_free(self, resume: bool | str | None) -> None:
        """Raise InputError where training would write over something; see checks.py."""
        checks.check_output_dir_is_free(self, resume)

    def packs(self, evaluating: bool) -> bool:
        """Whether sequences run one behind the other, without padding."""
        if evaluating and self.eval_packing is not None:
            return self.eval_packing
        return self.packing or self.padding_free

    @property
    def stop_path(self) -> str:
        """The file whose appearance stops the run."""
        return self.stop_file or os.path.join(self.output_dir, "STOP")


for alias, name in {
    "torch_dtype": "dtype",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}.items():
    setattr(GKDConfig, alias, Alias(OPTIONS[alias], name))
