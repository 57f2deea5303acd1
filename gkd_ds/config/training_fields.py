"""How an update is made, and where. See option.py for how fields are declared."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gkd_ds.config.option import (
    AtLeastOne,
    Bounds,
    JsonObject,
    NotNegative,
    Positive,
    Share,
    option,
)

Decay = Bounds(low=0, below=1)

# The schedules, each with the names that `lr_scheduler_kwargs` may hold for it.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}

# Of liger_kernel_config: kernels in the place of a loss.
LIGER_LOSSES = {"cross_entropy", "fused_linear_cross_entropy"}

# transformers' OptimizerNames, which cost an import of torch.
OPTIMIZERS = """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor
adamw_anyprecision adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad adamw_bnb_8bit adamw_8bit
ademamix_8bit lion_8bit lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit
paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_8bit
rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise
galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo grokadamw schedule_free_radam
schedule_free_adamw schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw""".split()
# Of these, the ones whose step for one weight depends on the others of its matrix or layer; and
# Adagrad, which has states from the start: DeepSpeed makes it anew, with one group of parameters.
NEED_WHOLE_PARAMETERS = """adafactor adagrad galore_adamw galore_adamw_8bit galore_adafactor
grokadamw apollo_adamw stable_adamw""".split()


@dataclass(kw_only=True)
class Batches:
    """Batches and length"""

    per_device_train_batch_size: Annotated[int, Bounds(low=1)] = option(
        8, "Samples per rank and micro-batch."
    )
    gradient_accumulation_steps: Annotated[int, Bounds(low=1)] = option(
        1, "Micro-batches per window, that is, per update."
    )
    num_train_epochs: Positive = option(3.0, "Passes over the data.")
    max_steps: Annotated[int, Bounds(low=-1)] = option(
        -1, "Updates; if positive, num_train_epochs does not count."
    )


@dataclass(kw_only=True)
class Optimizer:
    """Optimizer"""

    learning_rate: NotNegative = option(2e-5, "Peak learning rate.")
    weight_decay: NotNegative = option(
        0.0, "Decoupled weight decay; biases and norms are left out."
    )
    adam_beta1: Annotated[float, Decay] = option(0.9, "Decay of Adam's first moment.")
    adam_beta2: Annotated[float, Decay] = option(0.999, "Decay of Adam's second moment.")
    adam_epsilon: Positive = option(1e-8, "Adam's epsilon.")
    max_grad_norm: NotNegative = option(
        1.0, "Norm to which gradients are clipped; 0 for no clipping."
    )
    optim: str = option(
        "adamw_torch_fused", "Optimizer, by transformers' name: " + ", ".join(OPTIMIZERS) + "."
    )
    optim_args: str | None = option(
        None, "Further values of the optimizer, as transformers reads them: name=value,..."
    )
    optim_target_modules: list[str] | str | None = option(
        None, "Layers whose gradients GaLore and Apollo project: names, a pattern or all-linear."
    )
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: " + ", ".join(SCHEDULES) + "."
    )
    lr_scheduler_kwargs: JsonObject = option(
        dict, "Arguments of the schedule, such as num_cycles or min_lr."
    )
    warmup_ratio: Share = option(
        0.0, "Share of the updates over which the learning rate rises from 0."
    )
    warmup_steps: NotNegative = option(
        0,
        "Updates over which the learning rate rises from 0; below 1: a share of all updates; if "
        "positive, warmup_ratio does not count.",
    )


@dataclass(kw_only=True)
class Precision:
    """Precision and memory"""

    bf16: bool | None = option(
        None,
        "bfloat16 training; null: where the accelerator is a GPU that supports it, else fp32.",
    )
    fp16: bool = option(False, "float16 training with loss scaling.")
    bf16_full_eval: bool = option(
        False, "Evaluate in bfloat16: as training does, which it must then be in."
    )
    fp16_full_eval: bool = option(
        False, "Evaluate in float16: as training does, which it must then be in."
    )
    tf32: bool | None = option(None, "TF32 products on GPUs; null keeps torch's setting.")
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the learn phase (never while sampling)."
    )
    gradient_checkpointing_kwargs: JsonObject = option(None, "Arguments of gradient checkpointing.")
    activation_checkpointing: bool | None = option(
        None, "The newer name of gradient_checkpointing; where it is set, that one follows."
    )
    activation_checkpointing_kwargs: JsonObject = option(
        None, "The newer name of gradient_checkpointing_kwargs."
    )
    torch_empty_cache_steps: AtLeastOne = option(
        None, "Give unused accelerator memory back after every so many updates."
    )
    use_liger_kernel: bool = option(
        False,
        "Liger's kernels in the student's layers, where the package liger-kernel is installed; the "
        "loss stays ours.",
    )
    liger_kernel_config: JsonObject = option(
        None, "Which of them, as Liger names them: rope, swiglu, rms_norm, ..."
    )
    rollout_memory_mb: AtLeastOne = option(
        None,
        "MiB of one rank's KV cache; the window is sampled in as many batches as that takes; null: "
        "in one.",
    )
    offload_optimizer_states: bool = option(
        False,
        "Keep the student's optimizer states in host memory during rollouts, which then have their "
        "room.",
    )
    score_memory_mb: Annotated[int, Bounds(low=1)] = option(
        1024, "MiB of activations inside a layer of the teacher."
    )
    targets_memory_mb: Annotated[int, Bounds(low=0)] = option(
        4096,
        "MiB of the teacher's hidden states kept on the device; beyond it they go to the host.",
    )
    loss_memory_mb: Annotated[int, Bounds(low=1)] = option(
        64, "MiB of the logits chunk in the loss, both models together."
    )
    learn_tokens_per_micro_batch: AtLeastOne = option(
        None,
        "Tokens per forward of the learn phase; null: as many as the widest micro-batch would "
        "hold.",
    )


@dataclass(kw_only=True)
class Processes:
    """DeepSpeed and processes"""

    deepspeed: dict | str | None = option(
        None, "The student's DeepSpeed file or a dict; null: built-in ZeRO-3."
    )
    teacher_deepspeed: dict | str | None = option(
        None, "The teacher's DeepSpeed file or a dict; null: built-in resident ZeRO-3."
    )
    deepspeed_log_level: Literal["debug", "info", "warning", "error", "critical"] = option(
        "error", "How much of DeepSpeed's own log to show."
    )
    use_cpu: bool = option(False, "Run on the CPU even where there is an accelerator.")
    local_rank: Annotated[int, Bounds(low=-1)] = option(
        -1, "Rank on this node, given by the launcher."
    )
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl", "xccl", "cncl", "mccl"] | None = (
        option(None, "Backend of torch.distributed; null: the accelerator's.")
    )
    ddp_timeout: Annotated[int, Bounds(low=1)] = option(
        1800, "Seconds after which a collective gives up."
    )
