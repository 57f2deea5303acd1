"""TRL's fields that nothing here has to act on: one table, and the answer to each of their values.

already so   what the field asks for is done anyway; a value that asks for something else is refused
fixed        only one way is possible here, for the reason given; other values are refused
retired      an old name; any value but the default is refused with its successor

They exist so that code and recipes written for TRL keep working, and nothing in them is ignored. A
field that begins to act moves from here to the file of its group.
"""

import dataclasses
from dataclasses import InitVar, dataclass
from typing import Annotated, Any, Literal

from gkd_ds.config.option import SECRET, JsonObject, Read, option
from gkd_ds.config.values import wrong
from gkd_ds.runtime.errors import show

Kind = Literal["already so", "fixed", "retired"]
ALREADY, FIXED, RETIRED = "already so", "fixed", "retired"

ANY = None  # of `accepts`


@dataclass(frozen=True)
class Inactive:
    """A field, its type and default (`list` is an empty one), and why nothing acts on it.

    `accepts` are the values beside the default that ask for what is done: all of them (ANY), a
    tuple, or, of a mapping, a tuple for each of its keys. `reason` also says what to do instead.
    """

    name: str
    type: Any
    default: Any
    kind: Kind
    reason: str
    accepts: tuple | dict[str, tuple] | None = ()

    def is_accepted(self, value: Any) -> bool:
        default = [] if self.default is list else self.default
        if self.accepts is ANY or value == default or value in tuple(self.accepts):
            return True
        if isinstance(self.accepts, dict) and isinstance(value, dict):
            return all(value[key] in self.accepts.get(key, ()) for key in value)
        switched_off = not value and not default  # "", [], None and False all say the same
        return switched_off and self.accepts == ()


# Reasons of more than one field.
_TOKENIZED_ONCE = "the data set is tokenized once, before training, and needs no loader processes"
_BY_LENGTH = "the learn phase packs a window's samples by length in any case"
_NO_DDP = "DeepSpeed reduces the gradients, and needs no such hint"
_ZERO = "DeepSpeed shards the student; use deepspeed"
_NO_TPU = "DeepSpeed has no engine for TPUs; remove it"
_NO_APEX = "apex is not used; set fp16 or bf16"
_MEMORY = "set rollout_memory_mb, score_memory_mb, loss_memory_mb and learn_tokens_per_micro_batch"
_QUANTIZED = "ZeRO shards weights that are numbers of their own; train adapters (use_peft) in bf16"

TABLE = [
    # Data
    Inactive("dataloader_num_workers", int, 0, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("dataloader_prefetch_factor", int | None, None, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("dataloader_persistent_workers", bool, False, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("dataloader_pin_memory", bool, True, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("dataloader_multiprocessing_context", str | None, None, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("dataloader_in_order", bool, True, ALREADY, _TOKENIZED_ONCE, ANY),
    Inactive("group_by_length", bool, False, ALREADY, _BY_LENGTH, ANY),
    Inactive("length_column_name", str, "length", ALREADY, "lengths are counted, not read", ANY),
    Inactive(
        "train_sampling_strategy",
        str,
        "random",
        ALREADY,
        "the order of the samples is a permutation by data_seed; remove it",
        ("group_by_length", "batch_rebalance"),
    ),
    Inactive(
        "shuffle_dataset",
        bool,
        False,
        ALREADY,
        "the order of the samples is a permutation by data_seed in any case",
        ANY,
    ),
    Inactive(
        "ignore_data_skip",
        bool,
        False,
        FIXED,
        "the place in the data is a function of the step, so that a resume skips nothing; remove "
        "it",
    ),
    Inactive(
        "dataset_kwargs",
        JsonObject,
        None,
        ALREADY,
        "rows are read as chat messages or as prompt and completion; remove it",
        {"skip_prepare_dataset": (True, False)},
    ),
    Inactive(
        "dataset_text_field",
        str,
        "text",
        FIXED,
        "rows are read as chat messages or as prompt and completion; rename the columns",
    ),
    Inactive(
        "dataset_streaming",
        InitVar[bool],
        False,
        FIXED,
        "a data set is read whole and tokenized once; remove it",
    ),
    Inactive(
        "pad_to_multiple_of",
        Annotated[int | str | None, Read(int | Literal["auto"] | None)],
        None,
        FIXED,
        "sequences of similar length are padded together, to the longest; remove it",
        ("auto",),
    ),
    # Loss
    Inactive(
        "completion_only_loss",
        bool | None,
        None,
        ALREADY,
        "the loss is on completions alone; put what else is to be learned into the completion",
        (True,),
    ),
    Inactive(
        "average_tokens_across_devices",
        bool,
        True,
        ALREADY,
        "every completion token of a window weighs the same, on whatever rank; remove it",
    ),
    Inactive(
        "loss_type",
        str,
        "nll",
        FIXED,
        "the loss is the generalized Jensen-Shannon divergence; use beta to choose which",
        ("chunked_nll",),
    ),
    Inactive(
        "label_smoothing_factor",
        float,
        0.0,
        FIXED,
        "the target is the teacher's whole distribution; raise divergence_temperature to smooth it",
    ),
    Inactive(
        "neftune_noise_alpha",
        float | None,
        None,
        FIXED,
        "with noise in its embeddings the student that learns is not the one that sampled; remove "
        "it",
    ),
    Inactive(
        "router_aux_loss_coef",
        float | None,
        None,
        FIXED,
        "the loss is the divergence alone, which trains the routers as well; remove it",
        (0.0,),
    ),
    Inactive(
        "label_names",
        list[str] | None,
        None,
        ALREADY,
        "the labels are the completion tokens; remove it",
        ([], ["labels"]),
    ),
    # Models and adapters
    Inactive("load_in_8bit", InitVar[bool], False, FIXED, _QUANTIZED),
    Inactive("load_in_4bit", InitVar[bool], False, FIXED, _QUANTIZED),
    Inactive("bnb_4bit_quant_type", InitVar[str], "nf4", FIXED, _QUANTIZED),
    Inactive("use_bnb_nested_quant", InitVar[bool], False, FIXED, _QUANTIZED),
    Inactive("bnb_4bit_quant_storage", InitVar[str | None], None, FIXED, _QUANTIZED),
    Inactive(
        "lora_task_type",
        InitVar[str],
        "CAUSAL_LM",
        FIXED,
        "students and teachers are causal language models; remove it",
    ),
    Inactive(
        "use_cache",
        bool,
        False,
        FIXED,
        "a rollout always has a KV cache, and the learn phase has no use for one; remove it",
    ),
    # Precision and memory
    Inactive(
        "half_precision_backend",
        Literal["auto", "cuda_amp", "cpu_amp", "apex"],
        "auto",
        ALREADY,
        _NO_APEX,
        ("cuda_amp", "cpu_amp"),
    ),
    Inactive("fp16_backend", str, "auto", RETIRED, _NO_APEX),
    Inactive("fp16_opt_level", str, "O1", RETIRED, _NO_APEX),
    Inactive("torchdynamo", str | None, None, RETIRED, "use torch_compile_backend"),
    Inactive("jit_mode_eval", bool, False, RETIRED, "ZeRO's engines cannot be traced; remove it"),
    Inactive(
        "activation_offloading",
        bool,
        False,
        FIXED,
        "use gradient_checkpointing, and learn_tokens_per_micro_batch for smaller micro-batches",
    ),
    Inactive("auto_find_batch_size", bool, False, FIXED, _MEMORY),
    # Optimizer
    Inactive("adafactor", bool, False, RETIRED, "use optim: adafactor"),
    # Processes
    Inactive("ddp_find_unused_parameters", bool | None, None, ALREADY, _NO_DDP, ANY),
    Inactive("ddp_broadcast_buffers", bool | None, None, ALREADY, _NO_DDP, ANY),
    Inactive("ddp_static_graph", bool | None, None, ALREADY, _NO_DDP, ANY),
    Inactive("ignore_bias_buffers", InitVar[bool], False, ALREADY, _NO_DDP, ANY),
    Inactive(
        "ddp_bucket_cap_mb",
        int | None,
        None,
        FIXED,
        "DeepSpeed reduces the gradients; set reduce_bucket_size in its file",
    ),
    Inactive("fsdp", list[str] | str | None, None, FIXED, _ZERO),
    Inactive("fsdp_config", JsonObject, None, FIXED, _ZERO),
    Inactive("fsdp_min_num_params", int, 0, RETIRED, _ZERO),
    Inactive("fsdp_transformer_layer_cls_to_wrap", str | None, None, RETIRED, _ZERO),
    Inactive(
        "accelerator_config",
        JsonObject,
        None,
        ALREADY,
        "the engines are DeepSpeed's own and take the samples of a window from a schedule; remove "
        "what differs from it",
        {
            "split_batches": (False,),
            "dispatch_batches": (None, False),
            "even_batches": (True,),
            "use_seedable_sampler": (True,),
            "non_blocking": (True, False),
            "gradient_accumulation_kwargs": (None,),
            "use_configured_state": (False,),
        },
    ),
    Inactive(
        "parallelism_config",
        JsonObject,
        None,
        FIXED,
        "every rank works on samples of its own; remove it",
    ),
    Inactive("mp_parameters", str, "", FIXED, "it belongs to SageMaker; remove it"),
    Inactive("no_cuda", bool, False, RETIRED, "use use_cpu"),
    Inactive("use_mps_device", bool, False, RETIRED, "DeepSpeed chooses the device; remove it"),
    Inactive("tpu_num_cores", int | None, None, FIXED, _NO_TPU),
    Inactive("tpu_metrics_debug", bool, False, FIXED, _NO_TPU),
    Inactive(
        "debug",
        list[str] | str | None,
        "",
        FIXED,
        "a run says by itself where a NaN comes from, and stops after max_bad_updates; remove it",
    ),
    Inactive(
        "ray_scope",
        str | None,
        "last",
        FIXED,
        "a run searches no hyperparameters; use launch/sweep.sbatch",
    ),
    # Batches, evaluation, checkpoints, hub
    Inactive(
        "per_gpu_train_batch_size", int | None, None, RETIRED, "use per_device_train_batch_size"
    ),
    Inactive(
        "per_gpu_eval_batch_size", int | None, None, RETIRED, "use per_device_eval_batch_size"
    ),
    Inactive(
        "eval_use_gather_object",
        bool,
        False,
        ALREADY,
        "compute_metrics gets the predictions of all ranks, whatever they are",
        ANY,
    ),
    Inactive(
        "eval_accumulation_steps",
        int | None,
        None,
        ALREADY,
        "predictions go to the host after every batch",
        ANY,
    ),
    Inactive(
        "include_inputs_for_metrics", bool, False, RETIRED, "use include_for_metrics: [inputs]"
    ),
    Inactive(
        "use_legacy_prediction_loop",
        bool,
        False,
        RETIRED,
        "there is one evaluation loop; remove it",
    ),
    Inactive("past_index", int, -1, RETIRED, "no model carries a past between batches; remove it"),
    Inactive(
        "save_safetensors",
        bool,
        True,
        ALREADY,
        "models are written as safetensors alone; convert them where something needs pickles",
    ),
    Inactive(
        "save_on_each_node",
        bool,
        False,
        FIXED,
        "a checkpoint has parts of all nodes, in a directory that they share; remove it",
    ),
    Inactive(
        "enable_jit_checkpoint",
        bool,
        False,
        ALREADY,
        "SIGTERM always ends a run with a checkpoint",
        ANY,
    ),
    Inactive("push_to_hub_model_id", str | None, None, RETIRED, "use hub_model_id"),
    Inactive(
        "push_to_hub_organization",
        str | None,
        None,
        RETIRED,
        "use hub_model_id, as organization/name",
    ),
    Inactive("push_to_hub_token", Annotated[str | None, SECRET], None, RETIRED, "use hub_token"),
]


def _field(row: Inactive) -> dataclasses.Field:
    return option(row.default, f"{row.kind.capitalize()}: {row.reason}.")


# GKDConfig inherits them.
InactiveFields = dataclasses.make_dataclass(
    "InactiveFields",
    [(row.name, row.type, _field(row)) for row in TABLE],
    kw_only=True,
    namespace={"__doc__": "Nothing acts on them", "__module__": __name__},
)


def refuse_other_values(config: Any) -> None:
    """Raise InputError for the first of these fields of which the value is not accepted."""
    for row in TABLE:
        value = getattr(config, row.name)
        if row.is_accepted(value):
            continue
        if row.kind == RETIRED:  # its value may be a secret
            raise wrong(row.name, f"is not supported by gkd_ds any more: {row.reason}")
        raise wrong(row.name, f"is not supported by gkd_ds as {show(value)}: {row.reason}")
