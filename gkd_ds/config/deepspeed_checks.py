"""Refuse a DeepSpeed file that contradicts GKDConfig, before torch or DeepSpeed are imported.

`config` is a GKDConfig throughout, `name` the field that the file belongs to.
"""

import math
import os
from typing import Any

from gkd_ds.config.deepspeed import (
    block_of,
    built_in_student,
    conflict,
    is_number,
    precision_of_fields,
    read_deepspeed,
    refuse_flat_parameters,
)
from gkd_ds.config.paths import obstacle_to_writing

# What would divide a model or a sequence over ranks that gkd_ds takes to hold samples of their own.
OTHER_PARALLELISM = ("sequence_parallel_size", "ulysses", "tensor_parallel", "pipeline")

MONITORS = ("wandb", "tensorboard", "csv_monitor", "comet")

# What of GKDConfig the file's optimizer may repeat; the switches only choose between
# implementations.
ADAM_VALUES = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
ADAM_SWITCHES = (
    "torch_adam",
    "fused",
    "adam_w_mode",
    "bias_correction",
    "amsgrad",
    "fp32_optimizer_states",
)


def read_student_file(config: Any) -> dict | None:
    """The student's DeepSpeed file, read and checked; None if not given."""
    file = read_deepspeed("deepspeed", config.deepspeed)
    if file is not None:
        check_student_file(file, config)
    precision = precision_of_fields(config)
    used = file or built_in_student(config, config.world_size, precision)
    refuse_flat_parameters(config, used, precision)
    return file


def read_teacher_file(config: Any) -> dict | None:
    """The teacher's DeepSpeed file, read and checked; None if not given."""
    file = read_deepspeed("teacher_deepspeed", config.teacher_deepspeed)
    if file is not None:
        check_teacher_file(file, config)
    return file


# ---- The student ----


def check_student_file(file: dict, config: Any) -> None:
    """Refuse what contradicts `config` (a GKDConfig) or belongs to another field.

    Raises:
        InputError: with the key, the field, and what to change.
    """
    name = "deepspeed"
    stage = check_zero(name, file)
    if config.rollout_engine == "sharded" and stage != 3:
        raise conflict(
            name,
            f"has ZeRO stage {stage}, but rollout_engine: sharded keeps parameters partitioned and "
            "needs stage 3",
        )
    optimizer = block_of(name, block_of(name, file, "zero_optimization"), "offload_optimizer")
    if (
        optimizer.get("device") == "nvme"
        and config.save_strategy != "no"
        and not config.save_only_model
    ):
        raise conflict(
            name,
            "keeps the optimizer on NVMe, which no checkpoint can be resumed with; set "
            "save_strategy: no or "
            "save_only_model: true, or offload_optimizer.device to cpu",
        )
    if config.offload_optimizer_states and stage in (1, 2):
        raise conflict(
            name,
            f"has ZeRO stage {stage}, where DeepSpeed itself holds on to the optimizer states that "
            "offload_optimizer_states would move; use stage 3 or set it to false",
        )
    if config.offload_optimizer_states and optimizer.get("device", "none") != "none":
        raise conflict(
            name,
            "has an offload_optimizer block, so the states are never on the device; remove "
            "offload_optimizer_states",
        )
    if "hybrid_engine" in file:
        raise conflict(
            name, "holds a hybrid_engine block; remove it and choose with rollout_engine"
        )
    check_foreign_blocks(name, file)
    check_equal(
        name,
        "train_micro_batch_size_per_gpu",
        file,
        "per_device_train_batch_size",
        config.per_device_train_batch_size,
    )
    check_equal(
        name,
        "gradient_accumulation_steps",
        file,
        "gradient_accumulation_steps",
        config.gradient_accumulation_steps,
    )
    check_equal(name, "gradient_clipping", file, "max_grad_norm", config.max_grad_norm)
    check_train_batch_size(name, file, config)
    check_hpz(name, file, config)
    check_precision(name, file, config)
    check_optimizer(name, file, config)


def check_equal(name: str, key: str, block: dict, field: str, ours: float) -> None:
    """`block[key]` is absent, "auto" or `ours`; `key` may show the way there, as
    optimizer.params.lr does.
    """
    theirs = block.get(key.rpartition(".")[2], "auto")
    if theirs == "auto":
        return
    if not is_number(theirs):
        raise conflict(
            name, f'has {key} {theirs!r}, which is not a number; write "auto" to take {field}'
        )
    if not math.isclose(theirs, ours, rel_tol=1e-9):
        raise conflict(
            name,
            f'has {key} {theirs}, but {field} is {ours}; write "auto" in the file or change '
            f"{field}",
        )


def check_train_batch_size(name: str, file: dict, config: Any) -> None:
    theirs = file.get("train_batch_size", "auto")
    if theirs == "auto":
        return
    per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
    ranks = config.world_size if "WORLD_SIZE" in os.environ else None
    if (
        not is_number(theirs)
        or theirs <= 0
        or theirs % per_rank
        or (ranks and theirs != per_rank * ranks)
    ):
        raise conflict(
            name,
            f"has train_batch_size {theirs!r}, but per_device_train_batch_size x "
            "gradient_accumulation_steps "
            f"is {per_rank} "
            f'on each of {ranks or "the"} ranks; write "auto" in the file',
        )


def check_hpz(name: str, file: dict, config: Any) -> None:
    """ZeRO++ keeps a second copy of the parameters in each group of so many ranks."""
    size = block_of(name, file, "zero_optimization").get("zero_hpz_partition_size", 1)
    ranks = config.world_size if "WORLD_SIZE" in os.environ else size
    if not is_number(size) or size < 1 or ranks % size:
        raise conflict(
            name,
            f"has zero_optimization.zero_hpz_partition_size {size!r}, which does not divide the "
            f"{ranks} ranks into "
            "groups; set it to the number of accelerators in a node",
        )


def check_precision(name: str, file: dict, config: Any) -> None:
    for key, ours in (("bf16", config.bf16), ("fp16", config.fp16)):
        enabled = block_of(name, file, key).get("enabled", "auto")
        if enabled == "auto":
            continue
        if not isinstance(enabled, bool):
            raise conflict(name, f'has {key}.enabled {enabled!r}; it must be true, false or "auto"')
        if enabled is not ours:
            state = "not set" if ours is None else str(ours).lower()
            raise conflict(
                name,
                f'has {key}.enabled {str(enabled).lower()}, but {key} is {state}; write "auto" in '
                "the file "
                f"or set {key}",
            )
    for key in ("amp", "torch_autocast"):
        if block_of(name, file, key).get("enabled"):
            raise conflict(
                name, f"switches {key} on; precision is set by bf16 and fp16, so remove that block"
            )


def check_optimizer(name: str, file: dict, config: Any) -> None:
    if "optimizer" not in file:
        return
    optimizer = block_of(name, file, "optimizer")
    kind = optimizer.get("type")
    if not config.optim.startswith("adamw_torch") or config.optim_args:
        raise conflict(
            name, "has an optimizer block, and GKDConfig sets optim or optim_args; remove one"
        )
    if kind not in ("Adam", "AdamW"):
        raise conflict(
            name,
            f"has the optimizer {kind!r}, but the student is trained with AdamW; use AdamW or "
            "remove the block",
        )
    params = block_of(name, optimizer, "params")
    for key, value in params.items():
        if key in ADAM_VALUES:
            check_equal(
                name,
                f"optimizer.params.{key}",
                params,
                ADAM_VALUES[key],
                getattr(config, ADAM_VALUES[key]),
            )
        elif key == "betas":
            ours = [config.adam_beta1, config.adam_beta2]
            if (
                value != "auto"
                and list(value if isinstance(value, (list, tuple)) else [value]) != ours
            ):
                raise conflict(
                    name,
                    f"has optimizer.params.betas {value!r}, but adam_beta1 and adam_beta2 are "
                    f'{ours}; write "auto"',
                )
        elif key not in ADAM_SWITCHES:
            raise conflict(
                name, f"has optimizer.params.{key}, which AdamW does not take here; remove it"
            )
    if params.get("adam_w_mode", True) is not True:
        raise conflict(
            name,
            "has optimizer.params.adam_w_mode off, but weight_decay is decoupled (AdamW); remove "
            "it",
        )


# ---- The teacher ----


def check_teacher_file(file: dict, config: Any) -> None:
    """The teacher is scored, never trained: stage 3, parameters possibly offloaded, no optimizer.

    Raises:
        InputError: with the key and what to change.
    """
    name = "teacher_deepspeed"
    stage = check_zero(name, file)
    if stage != 3:
        raise conflict(
            name,
            f"has ZeRO stage {stage}, but the teacher is streamed layer by layer and needs stage 3",
        )
    for key in ("optimizer", "hybrid_engine"):
        if key in file:
            raise conflict(
                name, f"holds a block {key!r}, but the teacher is never trained; remove it"
            )
    if "offload_optimizer" in block_of(name, file, "zero_optimization"):
        raise conflict(
            name,
            "holds zero_optimization.offload_optimizer, but the teacher has no optimizer; use "
            "offload_param",
        )
    check_precision(name, file, config)
    check_foreign_blocks(name, file)


# ---- Both ----


def check_zero(name: str, file: dict) -> int:
    """The ZeRO stage, after checking it and the offload blocks that depend on it."""
    if "zero_optimization" not in file:
        raise conflict(name, 'has no zero_optimization block; add one, such as {"stage": 3}')
    zero = block_of(name, file, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise conflict(name, f"has zero_optimization.stage {stage!r}; it must be 0, 1, 2 or 3")
    for key, least in (("offload_param", 3), ("offload_optimizer", 1)):
        block = block_of(name, zero, key)
        device = block.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise conflict(
                name, f"has zero_optimization.{key}.device {device!r}; it must be none, cpu or nvme"
            )
        if device != "none" and stage < least:
            raise conflict(
                name,
                f"has zero_optimization.{key} at stage {stage}, but it needs stage {least} or more",
            )
        if device == "nvme" and not isinstance(block.get("nvme_path"), str):
            raise conflict(
                name,
                f"offloads to NVMe without zero_optimization.{key}.nvme_path; give a directory on "
                "the local NVMe",
            )
        if device == "nvme" and obstacle_to_writing(block["nvme_path"]):
            raise conflict(
                name,
                f"has zero_optimization.{key}.nvme_path {block['nvme_path']!r}, where nothing can "
                "be "
                "written; "
                "give a directory on the local NVMe",
            )
    return stage


def check_foreign_blocks(name: str, file: dict) -> None:
    for key in MONITORS:
        if key in file:
            raise conflict(
                name,
                f"holds a block {key!r}, but gkd_ds owns the run's metrics; remove it and use "
                "report_to",
            )
    for key in OTHER_PARALLELISM:
        if file.get(key) not in (None, 1):
            raise conflict(
                name, f"holds {key!r}, but every rank works on samples of its own; remove it"
            )
    if "scheduler" in file:
        raise conflict(
            name,
            "holds a block 'scheduler'; remove it and use lr_scheduler_type and warmup_ratio"
            if name == "deepspeed"
            else "holds a block 'scheduler', but the teacher is never trained; remove it",
        )
