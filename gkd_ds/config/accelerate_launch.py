"""What `accelerate launch` asks for, in its environment variables: taken, or refused in a sentence.

    accelerate launch --use_deepspeed --zero_stage 3 --mixed_precision bf16 script.py

Its DeepSpeed settings become the student's DeepSpeed file, where the script names none. Its
precision is that of training.
"""

import os
import re
from typing import Any

from gkd_ds.config.values import TRUE_WORDS
from gkd_ds.runtime.errors import InputError

# Ways to train that are not DeepSpeed's.
_OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def take_launch_settings(config: Any) -> None:
    """Fill in what accelerate's launcher says and `config` (a GKDConfig) leaves open.

    Raises:
        InputError: it asks for what is not done here, or contradicts `config`.
    """
    for name, way in _OTHER_WAYS.items():
        if _is_on(name):
            raise InputError(
                f"accelerate launch asks for {way}, but DeepSpeed shards the student; launch with "
                "--use_deepspeed, or with deepspeed or torchrun."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise InputError(
            f"accelerate launch asks for compilation ({backend}); launch with --dynamo_backend no."
        )
    if _is_on("ACCELERATE_USE_CPU"):
        config.use_cpu = True
    _take_precision(config)
    if _is_on("ACCELERATE_USE_DEEPSPEED") and config.deepspeed is None:
        config.deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or _deepspeed()


def _take_precision(config: Any) -> None:
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted in ("", "no"):  # what accelerate says where nobody has said anything
        return
    if wanted not in ("bf16", "fp16"):
        raise InputError(
            f"accelerate launch asks for {wanted}; launch with --mixed_precision bf16, fp16 or no."
        )
    other = config.fp16 if wanted == "bf16" else config.bf16
    if other or (wanted == "bf16" and config.bf16 is False):
        raise InputError(
            f"accelerate launch asks for {wanted}, but GKDConfig has bf16 {config.bf16} and fp16 "
            f"{config.fp16}; set {wanted}: true, or launch with --mixed_precision no."
        )
    setattr(config, wanted, True)


def _deepspeed() -> dict[str, Any]:
    """The DeepSpeed file that the variables describe."""

    def variable(name: str) -> str | None:
        value = os.environ.get(f"ACCELERATE_{name}", "none")
        return None if value.lower() in ("none", "auto") else value

    def number(name: str) -> float | str:
        value = variable(name) or "auto"
        is_number = re.fullmatch(r"\d+(\.\d*)?(e[-+]?\d+)?", value)
        return float(value) if is_number else value  # deepspeed_checks.py refuses other text

    stage = variable("DEEPSPEED_ZERO_STAGE") or "2"  # accelerate's default
    zero: dict[str, Any] = {"stage": int(stage) if stage.isdecimal() else stage}
    for what in ("optimizer", "param"):
        device = variable(f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE")
        if device is not None:
            path = variable(f"DEEPSPEED_OFFLOAD_{what.upper()}_NVME_PATH")
            zero[f"offload_{what}"] = {"device": device} | ({"nvme_path": path} if path else {})
    return {
        "zero_optimization": {**zero, "reduce_bucket_size": "auto"},
        "gradient_accumulation_steps": number("GRADIENT_ACCUMULATION_STEPS"),
        "gradient_clipping": number("GRADIENT_CLIPPING"),
    }


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in TRUE_WORDS
