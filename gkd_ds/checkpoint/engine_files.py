"""DeepSpeed's checkpoint files, written so that no rank is left waiting, and read without running
code.

`engine.save_checkpoint` writes between collectives. When the disk is full on one rank only, the
exception takes that rank out and the others wait for it until their timeout. So errors are kept
until every rank is through. `engine.load_checkpoint` unpickles with `weights_only=False`; here only
tensors, plain Python values and the few classes that DeepSpeed itself stores
(manifest.HARMLESS_CLASSES) are let in.
"""

import copyreg
import io
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

from gkd_ds.checkpoint.manifest import HARMLESS_CLASSES
from gkd_ds.engine import zero
from gkd_ds.runtime import faults
from gkd_ds.runtime.errors import InputError

TAG = "engine"  # the folder inside the checkpoint that DeepSpeed's files go to
STUDENT = "gkd_ds student"  # the key of `_description` in the files of model states

# DeepSpeed (0.19.8) only copies the swap files back: Adam's step, the learning rate and small
# groups stay new.
NVME_OPTIMIZER = (
    "a run whose optimizer is on NVMe cannot be resumed; to have checkpoints, use "
    "offload_optimizer.device cpu in the "
    "DeepSpeed file, or more ranks."
)

# Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr, which no reader
# here lets in.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class _TellingFile(io.BufferedWriter):
    """A file that calls `heartbeat` whenever something is written to it."""

    heartbeat: Callable[[], None]

    def write(self, block: Any) -> int:
        self.heartbeat()
        return super().write(block)


class PatientFiles(CheckpointEngine):
    """DeepSpeed's plug for reading and writing files; the first error in writing is kept in
    `error`.
    """

    def __init__(self, heartbeat: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.name, self.heartbeat = "gkd_ds", heartbeat
        self.error: Exception | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Like os.makedirs, but keeps the error."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file, unless an earlier one failed."""
        if self.error is not None:
            return
        try:
            faults.point("save.file")
            with _TellingFile(io.FileIO(path, "wb")) as file:
                file.heartbeat = self.heartbeat
                torch.save(state_dict, file)
        except (
            Exception
        ) as error:  # whatever it is, this rank must get to the collectives that the others wait in
            # torch reports a full disk as a RuntimeError about positions, with the real reason
            # behind it
            self.error = error.__context__ if isinstance(error.__context__, OSError) else error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file of a verified checkpoint; raises UnpicklingError for anything but data."""
        self.heartbeat()
        return read(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to finish: checkpoint.py commits the whole directory."""
        return True


def read(path: str | Path, **options: Any) -> Any:
    """torch.load for DeepSpeed's files: raises UnpicklingError for anything but data. `options` go
    to torch.load.
    """
    with torch.serialization.safe_globals(
        [pkgutil.resolve_name(name) for name in HARMLESS_CLASSES]
    ):
        return torch.load(path, weights_only=True, **options)


def save_engine(
    engine: DeepSpeedEngine,
    directory: Path,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Write the engine's files to `directory`/engine: the `write` of checkpoint.save. A collective.

    `heartbeat` is called while files are written. Raises this rank's error after all collectives.
    """
    if engine.zero_nvme_offload_optimizer():
        raise InputError(NVME_OPTIMIZER)
    files, usual = PatientFiles(heartbeat), engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: (
        None
    )  # copies scripts on rank 0 only, and could fail there only
    state = {STUDENT: _description(engine)}
    try:
        engine.save_checkpoint(
            str(directory),
            tag=TAG,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script
    if files.error is not None:
        raise files.error


def load_engine(
    engine: DeepSpeedEngine,
    directory: Path,
    heartbeat: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Load what save_engine wrote, from a checkpoint that `find` has verified. A collective.

    `options` go to `engine.load_checkpoint`. Raises InputError, on all ranks and before anything is
    changed, when the checkpoint is of another student or another kind of engine.
    """
    require_same_student(engine, directory)
    usual, engine.checkpoint_engine = engine.checkpoint_engine, PatientFiles(heartbeat)
    try:
        # Frozen parameters are not in it; that the others are, `require_same_student` has seen.
        engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False, **options)
    finally:
        engine.checkpoint_engine = usual


def require_same_student(engine: DeepSpeedEngine, directory: Path) -> None:
    """Raise InputError, naming what differs, unless `directory` was saved by an engine like this
    one.

    DeepSpeed would find out by assertions, and by sizes that do not match, some of them on one rank
    only.
    """
    if engine.zero_nvme_offload_optimizer():
        raise InputError(NVME_OPTIMIZER)
    file = min((directory / TAG).glob("*model_states.pt"), default=None)
    if file is None:
        raise InputError(
            f"{directory} holds a model without the state of its training (save_only_model), so no "
            "run can go on from "
            "it; name the directory as model_name_or_path to start a new one."
        )
    here, there = _description(engine), read(file, map_location="cpu", mmap=True)[STUDENT]
    for what, change in (("ZeRO stage", "deepspeed"), ("precision", "bf16 and fp16")):
        if here[what] != there[what]:
            raise InputError(
                f"{directory} was written with {what} {there[what]}, and this run has "
                f"{here[what]}; "
                f"set {change} as it was then."
            )
    mine, saved = here["parameters"], there["parameters"]
    for name in sorted({*mine, *saved}):
        if mine.get(name) != saved.get(name):
            raise InputError(
                f"{directory} holds another student: parameter {name} is "
                f"{saved.get(name, 'nothing')} there and "
                f"{mine.get(name, 'nothing')} here; start with the model that the checkpoint was "
                "made of."
            )


def _description(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What must be the same for an engine to go on from another one's files."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    shapes = {
        name: list(zero.full_shape(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    return {
        "ZeRO stage": int(engine.zero_optimization_stage()),
        "precision": precision,
        "parameters": shapes,
    }
