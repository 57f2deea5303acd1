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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.optim.lr_scheduler import LambdaLR

from gkd_ds.checkpoint.manifest import HARMLESS_CLASSES
from gkd_ds.engine import zero
from gkd_ds.runtime import faults
from gkd_ds.runtime.errors import InputError

TAG = "engine"  # the folder inside the checkpoint that DeepSpeed's files go to
STUDENT = "gkd_ds student"  # the key of `_description` in the files of model states

GROUPS = "elements per group"  # of ZeRO-3's parameters; resharding.py reads others, too
# What else must be as it was, and the fields that say it.
REQUIRED = {
    "ZeRO stage": "deepspeed",
    "precision": "bf16 and fp16",
    "optimizer": "optim and the optimizer in the DeepSpeed file, or pass the same kind,",
    "loss scaling": "fp16 in the DeepSpeed file",
    "partitions": "zero_optimization in the DeepSpeed file",
}

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
    here, there = _description(engine), _written_description(directory)
    for what, change in REQUIRED.items():
        if here[what] != there.get(what, here[what]):
            raise InputError(
                f"{directory} was written with {what} {there[what]}, and this run has "
                f"{here[what]}; set {change} as it was then."
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


def same_groups(engine: DeepSpeedEngine, directory: Path) -> bool:
    """Whether ZeRO-3 put the parameters in the same groups when `directory` was written.

    Raises InputError for the checkpoint of a model alone.
    """
    here, there = _description(engine), _written_description(directory)
    return here[GROUPS] == there.get(GROUPS, here[GROUPS])


@contextmanager
def settings_kept(engine: DeepSpeedEngine, passed: tuple[str, ...]) -> Iterator[list[str]]:
    """Around a load: settings stay those that the engine was made with, and the schedule of the
    rate is evaluated where the checkpoint was.

    A load brings the checkpoint's rate, decay, betas and clipping, too. `passed` says which of
    "optimizer" and "schedule" are the caller's. Whether a value in the caller's optimizer is a
    setting or a state, only its own load_state_dict knows: what that overrules is listed, a
    sentence each.
    """
    optimizer, schedule, ours = engine.optimizer, engine.lr_scheduler, "optimizer" not in passed
    given = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    rates = schedule.base_lrs if isinstance(schedule, LambdaLR) else []
    overruled: list[str] = []
    yield overruled
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        if not ours:
            overruled += _overruled(settings, group)
        group.update(settings if ours else {})
    if isinstance(schedule, LambdaLR):
        _evaluate(schedule, rates if ours else schedule.base_lrs, optimizer.param_groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer.clip_grad = engine.gradient_clipping()


def _overruled(given: dict[str, Any], loaded: dict[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        if name != "lr" and loaded.get(name, value) != value:  # the schedule has set lr
            yield (
                f"the optimizer that was passed has {name} {value}, and goes on with the "
                f"checkpoint's {loaded[name]}"
            )


def _evaluate(schedule: LambdaLR, peaks: list[float], param_groups: list[dict[str, Any]]) -> None:
    """Set the rates of the parameter groups to what the schedule, a function of the number of
    updates, says where it is. The configuration's schedules are all of this kind.
    """
    rates = [
        peak * share(schedule.last_epoch)
        for peak, share in zip(peaks, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict(schedule.state_dict() | {"base_lrs": peaks, "_last_lr": rates})
    for group, rate in zip(param_groups, rates, strict=True):
        group["lr"] = rate


def _description(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What must be the same for an engine to go on from another one's files, plain values only."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    stage, optimizer = int(engine.zero_optimization_stage()), engine.basic_optimizer
    fused = " (fused)" if optimizer.defaults.get("fused") else ""
    shapes = {
        name: list(zero.full_shape(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    scaling = {"static": engine.loss_scale(), **(engine.dynamic_loss_scale_args() or {})}
    partitions = {
        "round_robin_gradients": engine.zero_round_robin_gradients(),
        "parameter_alignment": engine.zero_parameter_alignment(),
    }
    return {
        "ZeRO stage": stage,
        "precision": precision,
        "optimizer": f"{type(optimizer).__name__}{fused} of {len(optimizer.param_groups)} groups",
        "loss scaling": scaling if engine.fp16_enabled() else None,
        "partitions": partitions if stage in (1, 2) else None,
        GROUPS: engine.zero_sub_group_size() if stage == 3 else None,
        "parameters": shapes,
    }


def _written_description(directory: Path) -> dict[str, Any]:
    """The description of the engine that wrote a checkpoint; older ones lack some of its names."""
    file = min((directory / TAG).glob("*model_states.pt"), default=None)
    if file is None:
        raise InputError(
            f"{directory} holds a model without the state of its training (save_only_model), so no "
            "run can go on from "
            "it; name the directory as model_name_or_path to start a new one."
        )
    return read(file, map_location="cpu", mmap=True)[STUDENT]
