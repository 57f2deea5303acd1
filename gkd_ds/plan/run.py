"""What a run will be, from configurations alone: the models' sizes, the batches, where the engines
keep what.

    python -m gkd_ds.train --config recipe.yaml --dry_run         # the memory of one rank
    python tools/plan.py --config recipe.yaml --hostfile hosts    # work and times of a cluster

memory.py and dry_run.py make of it what a run takes and what `--dry_run` prints.
No weight is read: models are built on torch's meta device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import (
    BUILT_IN_TEACHER,
    built_in_student,
    is_number,
    precision_of_fields,
    resolve_auto,
)
from gkd_ds.data.schedule import StepScheduler
from gkd_ds.engine import adapters
from gkd_ds.engine.adapters import Adapter
from gkd_ds.engine.cache_size import estimated, head_size, largest
from gkd_ds.engine.causal_lm import decoder_layers
from gkd_ds.runtime.errors import InputError

MIB = 2**20
PHASES = ("rollout", "score", "learn", "update")
LENGTH_IF_UNBOUNDED = 1024  # tokens of a prompt, where max_length is null


# ---- Models ----


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of elements, not bytes. `layers_total` + `embedding` + `head` + `glue` = `total`."""

    total: int
    layers_total: int  # all decoder layers
    layers_active: int  # of them, what one token passes through (fewer in a mixture of experts)
    largest_layer: int
    embedding: int
    head: int  # 0 where it is tied to the embedding
    glue: int  # norms, position tables
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_per_token: int  # keys and values of one token of one row, in all layers
    states_per_row: int  # what the layers keep of a row beside them: recurrent states
    attention_width: int  # heads x head size
    layer_matrices: tuple[int, ...]  # each matrix of one layer
    largest_matrix: int
    trained: int  # what has gradients and optimizer states: all of it, or the adapter
    adapted: int  # the matrices that have an adapter

    @property
    def matrices(self) -> tuple[int, ...]:
        """All but the head's."""
        return self.layer_matrices * self.layers + (self.embedding,)


def count_model(
    source: str,
    init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    adapter: Adapter | None = None,
) -> ModelCounts:
    """Count a model from its configuration: a directory, a hub name, or a config.json file. With an
    `adapter` on it, only that is trained.

    Raises:
        InputError: the configuration cannot be read, or is not one of a causal language model.
    """
    known = {
        key: (init_kwargs or {})[key]
        for key in ("gguf_file", "revision")
        if key in (init_kwargs or {})
    }
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **known)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"The model configuration of '{source}' cannot be used ({reason}); check the path."
        ) from None
    if adapter is None:
        return count_parameters(model)
    plain = count_parameters(model)
    adapter.attach(model, trainable=True)
    tuned = [layer.get_base_layer() for _, layer in adapters.layers(model)]
    return replace(
        plain,
        total=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapted=sum(p.numel() for layer in tuned for p in layer.parameters()),
    )


def count_parameters(model: torch.nn.Module) -> ModelCounts:
    """Count a causal language model of transformers, on any device. All of it is trained."""
    text = model.config.get_text_config()
    layers = decoder_layers(model)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    experts = sum(p.numel() for name, p in layers.named_parameters() if ".experts." in name)
    used = largest(text, "num_experts_per_tok")
    of = largest(text, "num_local_experts") or largest(text, "num_experts")
    idle = round(experts * (1 - used / of)) if used and of else 0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    untied = 0 if head is embedding else head.numel()
    cache = estimated(model)
    return ModelCounts(
        total=total,
        layers_total=sum(per_layer),
        layers_active=sum(per_layer) - idle,
        largest_layer=max(per_layer),
        embedding=embedding.numel(),
        head=untied,
        glue=total - sum(per_layer) - embedding.numel() - untied,
        layers=len(per_layer),
        hidden=text.hidden_size,
        intermediate=largest(text, "intermediate_size") or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        kv_per_token=cache.per_token,
        states_per_row=cache.states,
        attention_width=largest(text, "num_attention_heads") * head_size(text),
        layer_matrices=max(
            (tuple(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers),
            key=len,
        ),
        largest_matrix=max(p.numel() for p in model.parameters()),
        trained=total,
        adapted=0,
    )


# ---- Batches ----


@dataclass(frozen=True)
class Batches:
    """How the data become windows. A window is one update."""

    samples: int
    ranks: int
    per_rank: int  # samples of a window on one rank
    per_window: int
    windows_per_epoch: int
    updates: int


def count_batches(config: GKDConfig, samples: int, ranks: int) -> Batches:
    """Raises InputError when there are no samples."""
    if samples < 1:
        raise InputError(
            f"The data set '{config.dataset_name}' has no rows; nothing can be trained on it."
        )
    scheduler = StepScheduler.of(config, samples, ranks)
    windows = scheduler.windows_per_epoch
    updates = (
        config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows)
    )
    return Batches(
        samples,
        ranks,
        scheduler.window_samples // ranks,
        scheduler.window_samples,
        windows,
        updates,
    )


# ---- What the DeepSpeed files decide ----


@dataclass(frozen=True)
class Engine:
    """The part of a DeepSpeed file that decides where things are."""

    stage: int
    params_on: str  # none (the device), cpu or nvme
    optimizer_on: str
    bucket: int  # elements of the gradient bucket
    prefetch: int
    max_live: int
    sub_group: int
    buffer_count: int  # pinned buffers for parameters on NVMe; 0: not given
    buffer_size: int  # elements of each; 0: not given
    nvme_optimizer_buffers: int
    max_reuse: int
    hpz: int  # ranks over which ZeRO++ keeps a second copy of the parameters; 1: it does not

    @classmethod
    def of(cls, file: dict | None, hidden: int) -> "Engine":
        """`file` as it is resolved for a model of width `hidden`; None is the built-in teacher's.

        Raises:
            InputError: a size that is no number.
        """
        zero = resolve_auto(file or BUILT_IN_TEACHER, hidden)["zero_optimization"]
        params, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}

        def number(block: dict, key: str, default: int) -> int:
            value = block.get(key, default)
            if not is_number(value):
                raise InputError(
                    f"The DeepSpeed configuration has {key} {value!r}, which is not a number."
                )
            return int(value)

        return cls(
            stage=zero.get("stage", 0),
            params_on=params.get("device", "none"),
            optimizer_on=optimizer.get("device", "none"),
            bucket=number(zero, "reduce_bucket_size", 500_000_000),
            prefetch=number(zero, "stage3_prefetch_bucket_size", 50_000_000),
            max_live=number(zero, "stage3_max_live_parameters", 1_000_000_000),
            sub_group=number(zero, "sub_group_size", 1_000_000_000),
            buffer_count=number(params, "buffer_count", 0),
            buffer_size=number(params, "buffer_size", 0),
            nvme_optimizer_buffers=number(optimizer, "buffer_count", 4),
            max_reuse=number(zero, "stage3_max_reuse_distance", 1_000_000_000),
            hpz=number(zero, "zero_hpz_partition_size", 1),
        )


@dataclass(frozen=True)
class Plan:
    """A run, reduced to what decides its memory: the worst case, with the longest sequences."""

    config: GKDConfig
    student: ModelCounts
    teacher: ModelCounts
    student_engine: Engine
    teacher_engine: Engine
    ranks: int
    weight_bytes: int  # 2 for bf16 and fp16, else 4
    on_cpu: bool = False
    teacher_is_base: bool = False  # the student's weights without its adapter: no second copy

    @property
    def rows(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def longest_completion(self) -> int:
        bound = self.config.max_length
        return (
            self.config.max_new_tokens
            if bound is None
            else min(self.config.max_new_tokens, bound - 1)
        )

    @property
    def longest(self) -> int:
        return self.config.max_length or LENGTH_IF_UNBOUNDED + self.longest_completion

    def is_whole(self, engine: Engine) -> bool:
        """Whether the engine's weights can be used where they are, without a copy."""
        return engine.stage < 3 or (self.ranks == 1 and (engine.params_on == "none" or self.on_cpu))

    @property
    def rollout_rows(self) -> int:
        """Rows that are decoded at a time."""
        if self.config.rollout_memory_mb is None:
            return self.rows
        student = self.student
        kept = self.longest * student.kv_per_token + student.states_per_row
        per_row = max(1, kept * self.weight_bytes)
        return max(1, min(self.rows, self.config.rollout_memory_mb * MIB // per_row))

    @property
    def learn_tokens(self) -> int:
        widest = self.config.per_device_train_batch_size * self.longest
        return self.config.learn_tokens_per_micro_batch or widest

    @property
    def pass_tokens(self) -> int:
        """Tokens of the window that one teacher pass may hold."""
        return max(
            self.longest,
            self.config.targets_memory_mb * MIB // (self.teacher.hidden * self.weight_bytes),
        )


def make_plan(config: GKDConfig, ranks: int, weight_bytes: int, on_cpu: bool = False) -> Plan:
    """Read what `config` names: DeepSpeed files and model configurations.

    Raises:
        InputError: one of them is missing or wrong.
    """
    student_file, teacher_file = config.read_deepspeed_files()
    student, adapter = adapters.split(
        config.model_name_or_path, adapters.of_fields(config), "student", config.model_init_kwargs
    )
    teacher, teacher_adapter = adapters.split(
        config.teacher_model_name_or_path, None, "teacher", config.teacher_model_init_kwargs
    )
    counts = {
        "student": count_model(
            student, config.model_init_kwargs, config.trust_remote_code, adapter
        ),
        "teacher": count_model(
            teacher, config.teacher_model_init_kwargs, config.trust_remote_code, teacher_adapter
        ),
    }
    student_file = student_file or built_in_student(config, ranks, precision_of_fields(config))
    engines = {
        "student_engine": Engine.of(student_file, counts["student"].hidden),
        "teacher_engine": Engine.of(teacher_file, counts["teacher"].hidden),
    }
    return Plan(
        config=config,
        ranks=ranks,
        weight_bytes=weight_bytes,
        on_cpu=on_cpu,
        teacher_is_base=adapters.is_base(config, student, adapter, teacher, teacher_adapter),
        **counts,
        **engines,
    )


def swapped(matrices: Iterable[int], ranks: int, element_size: int) -> list[int]:
    """Those that go to NVMe: DeepSpeed leaves shards below 1 MiB in host memory."""
    return [size for size in matrices if math.ceil(size / ranks) * element_size >= MIB]
