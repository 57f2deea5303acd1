"""DeepSpeed's checkpoint files, written so that no rank is left waiting, and read without running code.

`engine.save_checkpoint` writes between collectives. When the disk is full on one rank only, the exception
takes that rank out and the others wait for it until their timeout. So errors are kept until every rank is
through. `engine.load_checkpoint` unpickles with `weights_only=False`; here only tensors, plain Python values
and the three classes that DeepSpeed itself stores are let in.
"""

import copyreg
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from gkd_ds import faults
from gkd_ds.errors import InputError

TAG = "engine"  # the folder inside the checkpoint that DeepSpeed's files go to

# Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr, which no reader here lets in.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class PatientFiles(CheckpointEngine):
    """DeepSpeed's plug for reading and writing files; the first error in writing is kept in `error`."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "gkd_ds"
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
            with open(path, "wb") as file:
                torch.save(state_dict, file)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about positions, with the real reason behind it
            self.error = error.__context__ if isinstance(error.__context__, OSError) else error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file of a verified checkpoint; raises UnpicklingError for anything but data."""
        return read(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to finish: checkpoint.py commits the whole directory."""
        return True


def read(path: str | Path, **options: Any) -> Any:
    """torch.load for DeepSpeed's files: raises UnpicklingError for anything but data. `options` go to torch.load."""
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        return torch.load(path, weights_only=True, **options)


def save_engine(engine: DeepSpeedEngine, directory: Path, client_state: dict[str, Any] | None = None) -> None:
    """Write the engine's files to `directory`/engine: the `write` of checkpoint.save. A collective.

    `client_state` may hold tensors and plain Python values. Raises this rank's error after all collectives.
    """
    files, usual = PatientFiles(), engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: (
        None
    )  # copies scripts on rank 0 only, and could fail there only
    try:
        engine.save_checkpoint(str(directory), tag=TAG, client_state=client_state or {}, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script
    if files.error is not None:
        raise files.error


def load_engine(engine: DeepSpeedEngine, directory: Path, **options: Any) -> dict[str, Any]:
    """Load what save_engine wrote, from a checkpoint that `find` has verified. A collective.

    Returns the client_state. `options` go to `engine.load_checkpoint`. Raises InputError when DeepSpeed finds
    nothing to load.
    """
    if not any((directory / TAG).glob("*model_states.pt")):
        raise InputError(
            f"{directory} holds a model without the state of its training (save_only_model), so no run can go on from "
            "it; name the directory as model_name_or_path to start a new one."
        )
    usual, engine.checkpoint_engine = engine.checkpoint_engine, PatientFiles()
    try:
        path, client_state = engine.load_checkpoint(str(directory), tag=TAG, **options)
    finally:
        engine.checkpoint_engine = usual
    if path is None:
        raise InputError(f"{directory} holds no files of a DeepSpeed engine; resume from another checkpoint.")
    return client_state
