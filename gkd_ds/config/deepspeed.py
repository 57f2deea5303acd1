"""A DeepSpeed file: reading it, and filling in what it leaves to us. No torch, so that a wrong file
answers at once.

One owner per field: GKDConfig owns batch sizes, accumulation, learning rate, clipping, precision
and tracking; the DeepSpeed file owns ZeRO, offload and communication. In it our fields are "auto",
absent, or equal to ours: deepspeed_checks.py refuses the rest. `resolve_student` and
`resolve_teacher` give what DeepSpeed is started with; they change nothing outside.
"""

import copy
import difflib
import json
import math
from typing import Any, Literal

from gkd_ds.config.training_fields import NEED_WHOLE_PARAMETERS
from gkd_ds.runtime.errors import InputError

Precision = Literal["float32", "bfloat16", "float16"]

# DeepSpeed ignores a top-level key it does not know: a misspelt "zero_optimization" would train at
# stage 0.
TOP_LEVEL_KEYS = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
optimizer scheduler bf16 bfloat16 fp16 torch_autocast amp gradient_clipping zero_optimization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer hybrid_engine aio
checkpoint communication_data_type seq_parallel_communication_data_type
prescale_gradients gradient_predivide_factor gradient_allreduce_op data_types
steps_per_print wall_clock_breakdown memory_breakdown dump_state comms_logger
flops_profiler activation_checkpointing tensorboard wandb csv_monitor comet
monitor_config sparse_gradients disable_allgather compile tensor_parallel elasticity
autotuning nebula weight_quantization sequence_parallel_size ulysses data_efficiency
curriculum_learning compression_training pipeline moe log_level""".split()

# What the teacher's engine is where no file is given.
BUILT_IN_TEACHER = {"zero_optimization": {"stage": 3}}


# ---- Reading ----


def read_deepspeed(name: str, source: dict | str | None) -> dict | None:
    """The configuration behind GKDConfig's field `name`: a dict as it is, a path as the object in
    that file.

    Raises:
        InputError: the file is missing, unreadable, not JSON or not an object, or misspells a
        top-level key.
    """
    if source is None:
        return None
    if isinstance(source, dict):
        config = source
    else:
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError:
            raise InputError(
                f"The DeepSpeed file {source!r} ({name}) is not UTF-8 text; it must be JSON."
            ) from None
        except OSError as error:
            raise InputError(
                f"The DeepSpeed file {source!r} ({name}) cannot be read ({error.strerror}); check "
                "the path."
            ) from None
        try:
            config = json.loads(
                text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeated
            )
        except json.JSONDecodeError as error:
            raise InputError(
                f"The DeepSpeed file {source!r} ({name}) is not valid JSON in line {error.lineno}, "
                f"column {error.colno}: {error.msg}."
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"The DeepSpeed file {source!r} ({name}) is not valid JSON: {error}."
            ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"The DeepSpeed configuration of {name} must be a JSON object, not "
            f"{type(config).__name__}."
        )
    for key in config:
        near = difflib.get_close_matches(str(key), TOP_LEVEL_KEYS, n=1, cutoff=0.85)
        if near and key not in TOP_LEVEL_KEYS:
            raise conflict(
                name, f"holds {key!r}, which DeepSpeed would ignore; did you mean {near[0]!r}?"
            )
    return config


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index])]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} appears twice")
    return dict(pairs)


# ---- Resolving ----


def precision_of_fields(config: Any) -> Precision:
    """What a GKDConfig says of the precision. Where it leaves it open, a GPU takes bf16
    (engine/accelerator.py).
    """
    return "float16" if config.fp16 else "bfloat16" if config.bf16 else "float32"


def built_in_student(config: Any, world_size: int, precision: Precision) -> dict[str, Any]:
    """What the student's engine is where no file is given: ZeRO-3, but in one process where
    `config.optim` needs whole parameters.
    """
    if world_size == 1 and config.optim in NEED_WHOLE_PARAMETERS and precision == "float32":
        return {"zero_optimization": {"stage": 0}}
    return {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}


def resolve_student(
    config: Any, *, world_size: int, hidden_size: int, precision: Precision
) -> dict[str, Any]:
    """The student's file (or the built-in one), with the fields that `config`, a GKDConfig, owns.

    `hidden_size` is the width of the student's model, `precision` what it is trained in.
    """
    resolved = copy.deepcopy(
        read_deepspeed("deepspeed", config.deepspeed)
        or built_in_student(config, world_size, precision)
    )
    refuse_flat_parameters(config, resolved, precision)
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    resolved |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": config.max_grad_norm,
    }
    if resolved["zero_optimization"].get("stage", 0) == 0 and precision == "float32":
        # Student.update clips, by a norm that is summed in fp64.
        resolved["gradient_clipping"] = 0.0
    if "optimizer" in resolved:
        resolved["optimizer"].setdefault("params", {}).update(
            lr=config.learning_rate,
            betas=[config.adam_beta1, config.adam_beta2],
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
    return resolve_auto(_with_ours(resolved, precision), hidden_size)


def resolve_teacher(config: Any, *, hidden_size: int, precision: Precision) -> dict[str, Any]:
    """The teacher's file (or the built-in one): ZeRO-3 without optimizer, offloaded as it says."""
    resolved = copy.deepcopy(
        read_deepspeed("teacher_deepspeed", config.teacher_deepspeed) or BUILT_IN_TEACHER
    )
    resolved |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    resolved.pop("train_batch_size", None)
    # It would put an autograd function written in Python in the place of F.linear, for the student,
    # too.
    resolved["zero_optimization"]["memory_efficient_linear"] = False
    return resolve_auto(_with_ours(resolved, precision), hidden_size)


def refuse_flat_parameters(config: Any, file: dict[str, Any], precision: Precision) -> None:
    """Raise InputError where `config.optim` needs parameters as they are, and DeepSpeed would give
    it flat pieces of them, or flat fp32 copies.
    """
    stage = file["zero_optimization"].get("stage", 0)
    if config.optim in NEED_WHOLE_PARAMETERS and (stage > 0 or precision != "float32"):
        raise InputError(
            f"GKDConfig field 'optim' is {config.optim}, which needs whole parameters, but ZeRO "
            f"stage {stage} in {precision} gives it flat parts of them; choose an optimizer that "
            "treats every weight alone, such as adamw_torch, or ZeRO stage 0 and float32."
        )


def resolve_auto(file: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """A copy of `file` without any "auto": sizes that follow from the model's width are filled in,
    the rest is left to DeepSpeed's defaults.
    """
    zero = file["zero_optimization"]
    # transformers' formulas for these three, so that one file serves both trainers.
    by_width = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    sizes = {name: value for name, value in by_width.items() if zero.get(name) == "auto"}
    return _without_auto({**file, "zero_optimization": {**zero, **sizes}})


def _with_ours(resolved: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """What both engines are told whatever their files say."""
    return resolved | {
        "bf16": {**(resolved.get("bf16") or {}), "enabled": precision == "bfloat16"},
        "fp16": {**(resolved.get("fp16") or {}), "enabled": precision == "float16"},
        "steps_per_print": 2**62,
        # The optimizer is torch's fused AdamW, on CPU partitions too: it needs no compiler on the
        # nodes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


# ---- For those who check ----


def block_of(name: str, file: dict, key: str) -> dict:
    block = file.get(key, {})
    if not isinstance(block, dict):
        raise conflict(name, f"has {key} {block!r}; it must be an object")
    return block


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def conflict(name: str, problem: str) -> InputError:
    return InputError(f"The DeepSpeed configuration of {name} {problem}.")
